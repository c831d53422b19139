"""The notebooks: valid, their commands parse, their outputs are clean; the slow test executes every cell."""

import ast
import json
import re
import shlex

import pytest
from conftest import ROOT
from test_docs import check_run_flags

from tlvit.__main__ import COMMANDS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLACES = {  # values of names that the notebooks compute
    "WORK": "runs", "LOCAL": "data", "photos": "data/photos", "files": ["photo.jpg"],
}  # fmt: skip
KB = 1000

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind="code"):
    """The cells of a kind with their sources as text."""
    found = json.loads(path.read_text())["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found if cell["cell_type"] == kind]


def settings(path, platform):
    """The names that the cells of settings define, without running any other cell."""
    names = {**PLACES, "PLATFORM": platform}
    for cell in cells(path):
        if {"parameters", "sizes"} & set(cell["metadata"].get("tags", [])):
            exec(cell["source"], names)
    return names


def commands(path, platform):
    """The commands, strings that begin with `tlvit`, as lists of words."""
    names = settings(path, platform)
    for cell in cells(path):
        for node in ast.walk(ast.parse(cell["source"])):
            start = getattr(node.values[0], "value", "") if isinstance(node, ast.JoinedStr) else ""
            if str(start).split()[:1] == ["tlvit"]:
                yield shlex.split(eval(compile(ast.Expression(node), path.name, "eval"), names))[1:]


def test_the_notebook_is_valid(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, f"{path.name}, {cell.id}", "exec")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("small", ["", "small"])
def test_commands_know_their_flags(path, platform, small, monkeypatch):
    monkeypatch.setenv("TLVIT_NOTEBOOK", small)
    found = list(commands(path, platform))
    assert {words[0] for words in found} >= {"train", "annotate", "maps", "convert", "predict"}
    for name, *arguments in found:
        if name in ("train", "eval"):
            check_run_flags([f"--mode={name}", *arguments], monkeypatch)
        else:
            module = __import__(COMMANDS[name][0], fromlist=["_parse"])
            module._parse(arguments)


def test_stored_outputs_are_small_and_clean(path):
    assert path.stat().st_size < 600 * KB
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    text = "\n".join(
        "".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/plain", [])) for o in outputs
    )
    assert not re.search(r"Traceback|[Ww]arning|\x1b|(?<![\w.])/(tmp|root|home|work|usr)/", text)


@pytest.mark.slow
def test_every_cell_runs(path, tmp_path):
    """At small size."""
    pytest.importorskip("nbclient")
    from scripts.run_notebooks import execute

    notebook = execute(path, tmp_path, small=True)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
