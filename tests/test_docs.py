"""README and docs: Python blocks run, commands exist, links resolve, public names are documented."""

import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import tlvit
from tlvit import config
from tlvit.__main__ import COMMANDS

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (?=\S)((?:.*\\\n)*.*)", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PUBLIC = [name for name in tlvit.__all__ if name not in ("__version__", "config")]


def name_of(page):
    return str(page.relative_to(ROOT))


def commands_of(page):
    """The commands of tlvit's programs in a page, one list of words each."""
    text = page.read_text()
    blocks = SHELL.findall(text) if page.parent.name == "docs" else INDENTED.findall(text)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        for start in (["tlvit"], ["python", "-m"]):
            for i in range(len(words) - len(start)):
                if words[i : i + len(start)] == start and (start == ["tlvit"] or "." in words[i + 2]):
                    yield words[i + len(start) :]


COMMAND_LINES = [
    (name_of(page), " ".join(words)) for page in PAGES for words in commands_of(page) if "=" not in words[0]
]


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory):
    """A folder with what the pages mention: a model folder, an image, and a data set of class folders."""
    from tlvit.checkpoints.model_info import ModelInfo
    from tlvit.checkpoints.native import save_model_folder

    folder = tmp_path_factory.mktemp("docs")
    info = ModelInfo(model="lvvit_s", num_classes=10, image_size=(64, 64), options={"depth": 1})
    (folder / "runs").mkdir()
    save_model_folder(folder / "runs" / "lvvit_s", info.build(), info)
    pixels = np.random.RandomState(0).randint(0, 255, (80, 100, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    for path in ("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg"):
        (folder / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "photos" / path)
    return folder


LONG = ("docs/reference/models.md", "docs/token_labeling.md", "docs/annotators.md")  # many seconds


def example_pages():
    """The pages with Python blocks."""
    pages = [page for page in PAGES if PYTHON.search(page.read_text())]
    slow = lambda page: pytest.mark.slow if name_of(page) in LONG else ()
    return [pytest.param(page, id=name_of(page), marks=slow(page)) for page in pages]


@pytest.mark.parametrize("page", example_pages())
def test_python_blocks_run_as_printed(page, example_folder, monkeypatch):
    """In their order and in one namespace for each page."""
    monkeypatch.chdir(example_folder)
    namespace = {"__name__": "docs"}
    text = page.read_text()
    for block in PYTHON.finditer(text):
        line = text[: block.start(1)].count("\n")
        code = compile("\n" * line + block[1], name_of(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        expected = re.findall(r"print\(.*\)  # (.*)$", block[1], re.MULTILINE)
        for text_of_line in expected:
            assert text_of_line in printed.getvalue().splitlines()


@pytest.mark.parametrize(("page", "command"), COMMAND_LINES)
def test_commands_exist_and_know_their_flags(page, command, example_folder, monkeypatch):
    monkeypatch.chdir(example_folder)
    name, *arguments = command.split(" ")
    arguments = arguments[: next((i for i, a in enumerate(arguments) if a in ("|", "&&", ">")), None)]
    if name in COMMANDS:
        if name in ("train", "eval"):
            arguments = [f"--mode={name}", *arguments]
        name = COMMANDS[name][0]
    if name == "tlvit.main":
        check_run_flags(arguments, monkeypatch)
    elif name.startswith("tlvit.") and name.removeprefix("tlvit.") in COMMANDS:
        importlib.import_module(name)._parse(arguments)
    else:
        assert name.split(".")[0] in ("scripts", "pytest", "mkdocs", "pip"), f"{page}: {command}"
        if name.startswith("scripts."):
            assert (ROOT / f"{name.replace('.', '/')}.py").exists()


def check_run_flags(arguments, monkeypatch):
    """Parses the flags of `tlvit train` and `tlvit eval`, and checks the settings they give."""
    from tlvit import main

    monkeypatch.setattr(main, "load_workdir", lambda workdir: config.default())  # the pages' workdirs
    arguments = [a.replace("=configs/", f"={ROOT}/configs/") for a in arguments]
    config.resolve(main.parse_flags(arguments).config)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    """Links between files; `make docs` also checks anchors."""
    for link in LINK.findall(page.read_text()):
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_an_example_and_a_place_in_the_reference(name):
    value = getattr(tlvit, name)
    assert "Example:" in inspect.getdoc(value), f"tlvit.{name} has no example"
    entries = re.findall(
        r"^::: (\S+)$", "\n".join(p.read_text() for p in (ROOT / "docs/reference").glob("*.md")), re.MULTILINE
    )
    assert f"{value.__module__}.{name}" in entries


def test_reference_names_exist():
    for page in (ROOT / "docs/reference").glob("*.md"):
        for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            module, _, name = entry.rpartition(".")
            assert hasattr(importlib.import_module(module), name), entry


def test_the_settings_page_has_every_setting():
    hooks = importlib.import_module("docs.hooks")
    text = hooks.on_page_markdown((ROOT / "docs/settings.md").read_text())
    for name, _, _, meaning in config.settings():
        assert f"| `{name.removeprefix('config.')}` |" in text
        assert meaning.replace("|", "\\|") in text


def test_the_model_zoo_page_has_the_tables(monkeypatch):
    hooks = importlib.import_module("docs.hooks")
    monkeypatch.setattr(hooks.model_zoo, "tables", lambda: "## LV-ViT")
    text = hooks.on_page_markdown((ROOT / "docs/models.md").read_text())
    assert text.rstrip().endswith("\n\n## LV-ViT")


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md"))


def test_recipes_page_lists_every_recipe():
    from tlvit.main import recipe_names

    listed = re.findall(r"^\| `(\w+)`", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)
    assert sorted(listed) == recipe_names()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


@pytest.mark.slow
def test_the_pages_build(tmp_path):
    """`make docs`, where mkdocs is installed."""
    pytest.importorskip("mkdocs")
    from mkdocs.__main__ import cli

    cwd = os.getcwd()
    try:
        os.chdir(ROOT)
        cli(["build", "--quiet", "--strict", "--site-dir", str(tmp_path)], standalone_mode=False)
    finally:
        os.chdir(cwd)
        sys.modules.pop("mkdocs_hooks", None)
    assert "optim.base_batch_size" in (tmp_path / "settings.html").read_text()
