"""Executes the notebooks and stores their outputs in them.

    python -m scripts.run_notebooks                                     # all of notebooks/, about 15 minutes
    python -m scripts.run_notebooks notebooks/imagenet_tpu.ipynb
    python -m scripts.run_notebooks --small --out=/tmp/small            # minutes; notebooks/ stays as it is

A notebook runs in an empty folder, with the tlvit of this checkout. A cell that fails ends the run. Of
imagenet_tpu.ipynb the outputs of the small run are stored: its real run needs ImageNet.
"""

import argparse
import base64
import io
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence

import nbclient
import nbformat
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
QUALITY = 70  # of stored pictures
ONLY_SMALL = ("imagenet_tpu",)  # the real run of these needs ImageNet
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def execute(path: pathlib.Path, folder: pathlib.Path, *, small: bool) -> nbformat.NotebookNode:
    """Runs all cells of a notebook.

    Args:
      path: the notebook.
      folder: the working folder of its kernel.
      small: with the notebook's settings for tests.

    Returns:
      The notebook with the outputs of this run.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=_environment(small))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [tidy(output, folder) for output in join_streams(cell.outputs)]
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return notebook


def join_streams(outputs: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs, with successive texts of one stream as one output."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def tidy(output: nbformat.NotebookNode, folder: pathlib.Path) -> nbformat.NotebookNode:
    """An output with clean text and with pictures as JPEG, which keeps notebooks small."""
    if "text" in output:
        output.text = clean(output.text, folder)
    if "image/png" in output.get("data", {}):
        file = io.BytesIO(base64.b64decode(output.data["image/png"]))
        small = io.BytesIO()
        Image.open(file).convert("RGB").save(small, "JPEG", quality=QUALITY, optimize=True)
        del output.data["image/png"]
        output.data["image/jpeg"] = base64.b64encode(small.getvalue()).decode()
    return output


def clean(text: str, folder: pathlib.Path) -> str:
    """Printed text without escape codes and without the path of the working folder."""
    text = ESCAPES.sub("", text.replace("\r\n", "\n"))
    return text.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")


def _environment(small: bool) -> dict[str, str]:
    """The environment of the kernel."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
    environment.pop("TLVIT_NOTEBOOK", None)
    return environment | ({"TLVIT_NOTEBOOK": "small"} if small else {})


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0."""
    description, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m scripts.run_notebooks",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("notebooks", nargs="*", type=pathlib.Path, metavar="NOTEBOOK", help="default: all of notebooks/")
    add("--small", action="store_true", help="very little data, as in the tests")
    add("--out", type=pathlib.Path, metavar="FOLDER", help="write the results there, not over the notebooks")
    options = parser.parse_args(arguments)
    for path in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, pathlib.Path(folder), small=options.small or path.stem in ONLY_SMALL)
        target = options.out / path.name if options.out else path
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        print(f"{target}: {target.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
