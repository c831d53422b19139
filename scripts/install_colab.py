"""Installs tlvit into the Python of Google Colab, or of another machine that comes with JAX.

    python scripts/install_colab.py --dry-run    # prints what would be installed
    python scripts/install_colab.py

JAX, jaxlib and the package of the accelerator (libtpu, or a CUDA plugin) work together in one version only.
If those that are installed meet tlvit's requirements, a constraints file pins them, so that pip changes none
of them. If JAX is too old, all of them are replaced in one step, together with NumPy, which a newer JAX may
need. Other packages that meet the requirements keep their versions. TensorFlow is added only where there is
none, because `tensorflow-cpu` would overwrite the files of `tensorflow`.
"""

import argparse
import dataclasses
import glob
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
JAX = re.compile(r"jax|jaxlib|libtpu|jax-(cuda|rocm).*")  # these packages have one version
PLUGINS = {"tpu": ["libtpu"], "gpu": ["jax-cuda12-plugin", "jax-cuda13-plugin"], "cpu": []}
CUDA_13_DRIVER = 580  # the first NVIDIA driver for CUDA 13
# Kept if they meet the requirements. pip would keep most of them anyway; with a constraint it must.
KEPT = re.compile(
    r"numpy|scipy|ml-dtypes|protobuf|pillow|matplotlib|pandas|scikit-learn|ipython|ipykernel|"
    r"tensorflow(-cpu)?|tensorboard|torch|torchvision|nvidia-.*"
)
TENSORFLOW = [Requirement("tensorflow>=2.20"), Requirement("tensorflow-cpu>=2.20")]
SHOWN = [Requirement("tensorboard>=2.20"), Requirement("matplotlib>=3.8"), Requirement("scikit-learn>=1.4")]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What pip is asked for.

    Attributes:
      extras: extras of tlvit.
      requirements: further requirements.
      constraints: versions that stay, by package.
      too_old: requirements that the installed packages do not meet, by package.
    """

    extras: tuple[str, ...]
    requirements: tuple[str, ...]
    constraints: dict[str, str]
    too_old: dict[str, str]


def make_plan(
    installed: Mapping[str, str], accelerator: str, *, driver: int = 0, python: str | None = None
) -> Plan:
    """Decides what is installed and what stays.

    Args:
      installed: version of every installed package, by its normalized name.
      accelerator: "tpu", "gpu" or "cpu".
      driver: major version of the NVIDIA driver.
      python: version such as "3.12"; None: that of this process.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = {"extra": ""} | ({"python_version": python} if python else {})
    wanted = [*map(Requirement, project["dependencies"]), *TENSORFLOW, *SHOWN]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate(environment)]
    too_old = {}
    for requirement in wanted:
        name = str(canonicalize_name(requirement.name))
        if name in installed and not requirement.specifier.contains(installed[name], prereleases=True):
            too_old[name] = str(requirement.specifier)
    new_jax = "jax" in too_old or "jax" not in installed
    found = [name for name in PLUGINS[accelerator] if name in installed]
    extras = []
    if accelerator != "cpu" and (new_jax or not found):
        extras.append("tpu" if accelerator == "tpu" else _cuda_extra(found, driver))
    if not {"tensorflow", "tensorflow-cpu"} & installed.keys():
        extras.append("tf")
    requirements = [str(r) for r in SHOWN if r.name in too_old or canonicalize_name(r.name) not in installed]
    requirements += [str(r) for r in TENSORFLOW if r.name in too_old]

    def stays(name: str) -> bool:
        if JAX.fullmatch(name):
            return not new_jax
        return bool(KEPT.fullmatch(name)) and not (new_jax and name == "numpy") and name not in too_old

    constraints = {name: version for name, version in sorted(installed.items()) if stays(name)}
    return Plan(tuple(extras), tuple(requirements), constraints, too_old)


def _cuda_extra(found: Sequence[str], driver: int) -> str:
    """The extra of a GPU: of the CUDA version that JAX has already, else of the newest for the driver."""
    new = "jax-cuda13-plugin" in found if found else driver >= CUDA_13_DRIVER
    return "gpu" if new else "gpu-cuda12"


def find_accelerator() -> tuple[str, int]:
    """("tpu", "gpu" or "cpu", major version of the NVIDIA driver or 0), without importing JAX."""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") or "TPU_ACCELERATOR_TYPE" in os.environ:
        return "tpu", 0
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        if done.returncode == 0 and (match := re.match(r"\d+", done.stdout)):
            return "gpu", int(match[0])
    return "cpu", 0


def installed_packages() -> dict[str, str]:
    """Version of every installed package, by its normalized name."""
    found = importlib.metadata.distributions()
    return {str(canonicalize_name(d.metadata["Name"])): d.version for d in found if d.metadata["Name"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status of pip."""
    description, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python scripts/install_colab.py",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the plan")
    options = parser.parse_args(arguments)
    accelerator, driver = find_accelerator()
    before = installed_packages()
    plan = make_plan(before, accelerator, driver=driver)
    print(f"accelerator: {accelerator}")
    for name, requirement in plan.too_old.items():
        print(f"too old: {name} {before[name]} (needed: {requirement})")
    kept = [f"{name} {version}" for name, version in plan.constraints.items() if "nvidia" not in name]
    print(f"stay as they are: {', '.join(kept) or 'nothing'}")
    package = f"{ROOT}[{','.join(plan.extras)}]" if plan.extras else str(ROOT)
    print(f"to install: tlvit{package.removeprefix(str(ROOT))} {' '.join(plan.requirements)}", flush=True)
    if options.dry_run:
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(f"{name}=={version}" for name, version in plan.constraints.items()))
        file.flush()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        status = subprocess.run([*pip, "-c", file.name, package, *plan.requirements], check=False).returncode
    after = installed_packages()
    changed = [f"{name} {old} -> {after.get(name)}" for name, old in before.items() if old != after.get(name)]
    print(f"changed: {', '.join(changed) or 'nothing that was installed'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
