"""The wheel: it has the recipes and the types, its command runs, and it works in an empty folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import ROOT

import tlvit

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel; the build needs setuptools, which pip fetches."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"  # a build in the checkout would leave a folder build/, which later builds reuse
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for name in ("tlvit", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(copy)], check=True)
    return next(folder.glob("tlvit-*.whl"))


@pytest.mark.slow
def test_the_wheel_has_recipes_types_and_the_command(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"tlvit/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "tlvit").rglob("*.py")}
    assert recipes | sources | {"tlvit/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "scripts", "configs"))]
    entry = zipfile.ZipFile(wheel).read(f"{distribution()}.dist-info/entry_points.txt").decode()
    assert "tlvit = tlvit.__main__:console" in entry


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(wheel, tmp_path):
    """Recipes are found by name, and a model runs, without the checkout on the path."""
    package, empty = tmp_path / "package", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(package)
    code = (
        "import pathlib, tlvit, tlvit.main\n"
        "print(pathlib.Path(tlvit.__file__).parent)\n"
        "print(*tlvit.main.recipe_names())\n"
        "flags = tlvit.main.parse_flags(['--config=lvvit_m', '--workdir=run', '--config.epochs=7'])\n"
        "print(tlvit.config.resolve(flags.config).epochs, tlvit.__version__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=True)
    folder, recipes, numbers = done.stdout.splitlines()
    assert pathlib.Path(folder) == package / "tlvit"
    assert recipes.split() == sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
    assert numbers == f"7 {tlvit.__version__}"


def test_the_metadata_are_written_once():
    """setup.py lists packages only; the version comes from tlvit/version.py."""
    assert PROJECT["dynamic"] == ["version"]
    text = (ROOT / "setup.py").read_text()
    assert [
        word for word in ("install_requires", "extras_require", "version", "license") if word in text
    ] == []
    assert PROJECT["scripts"] == {"tlvit": "tlvit.__main__:console"}
    extras = {"tf", "gpu", "gpu-cuda12", "tpu", "gcs", "torch", "timm", "demo", "dev", "docs"}
    assert set(PROJECT["optional-dependencies"]) == extras


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda path: path.stem)
def test_constraints_are_exact_and_name_no_host(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    assert not any(mark in line for line in lines for mark in ("://", "@", "-e "))
    packages = {line.split("==")[0] for line in lines}
    assert {"jax", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "ruff", "pyrefly"} <= packages


def distribution():
    return f"tlvit-{tlvit.__version__}"
