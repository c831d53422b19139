"""Damages every file of a workdir in turn and resumes the run: it ends as if undamaged, or names the file."""

import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

import tiny_runs
from campaigns.worker import Worker
from tiny_runs import check_equal_states, last_state, student_command


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def halve(path: pathlib.Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: pathlib.Path) -> None:
    """Flips one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def remove(path: pathlib.Path) -> None:
    path.unlink()


def folder(path: pathlib.Path) -> None:
    """Puts a folder where the file is."""
    path.unlink()
    path.mkdir()


DAMAGES: tuple[Callable[[pathlib.Path], None], ...] = (empty, halve, flip, remove, folder)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a resumed run made of a damaged file: "equal", "refused", or why that is wrong."""

    file: str
    damage: str
    end: str
    text: str


def damaged_files(scene: pathlib.Path) -> list[str]:
    """The files of the workdir that the campaign damages: not the picture, nor earlier checkpoints.

    Of an earlier checkpoint it is the score, which is read to find the best one. Of the many equal files of
    arrays it is the first two.
    """
    workdir = scene / "student"
    files = [path for path in workdir.rglob("*") if path.is_file() and path.stat().st_size]
    names = sorted(str(path.relative_to(workdir)) for path in files if path.name != "report.png")
    last = f"checkpoints/{tiny_runs.STEPS}/"
    arrays = [name for name in names if name.startswith(f"{last}state/ocdbt.process_0/d/")]
    earlier = lambda name: name.startswith("checkpoints/") and not name.startswith(last)
    return [n for n in names if n not in arrays[2:] and (not earlier(n) or n.endswith("/12/metrics/metrics"))]


def resume(worker: Worker, scene: pathlib.Path, file: str, damage: Callable) -> Result:
    """Damages a file of a copy of the workdir, resumes the run there and judges its end.

    The run must end in the state of the undamaged one, bit for bit, or be refused in a sentence that has the
    file's name or that of a folder above it.
    """
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name) / "run"
        shutil.copytree(scene / "student", workdir)
        damage(workdir / file)
        done = worker.run(["train", *student_command(scene, workdir)], cwd=workdir.parent)
        result = lambda end: Result(file, damage.__name__, end, done.text)
        if "Traceback" in done.text:
            return result("traceback")
        if done.status == 1:
            named = [part for part in pathlib.Path(file).parts if part in done.text]
            return result("refused" if named else "refused without a name")
        if done.status != 0:
            return result(f"status {done.status}")
        try:
            step, _ = last_state(workdir)
            check_equal_states(workdir, scene / "student")
        except Exception as error:
            return result(f"another state: {error}")
        return result("equal" if step == tiny_runs.STEPS else f"ended at step {step}")


def campaign(scene: pathlib.Path) -> Iterator[Result]:
    """Every pair of file and damage."""
    pairs = [(file, damage) for file in damaged_files(scene) for damage in DAMAGES]
    with Worker() as worker:
        for file, damage in pairs:
            yield resume(worker, scene, file, damage)
