"""The campaigns: bad input, damaged files and stopped runs."""

import pathlib
import shutil

import pytest
from campaigns import bad_input, damage, kill
from campaigns.worker import Worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def worker():
    with Worker() as process:
        yield process


def check(case: bad_input.Case, scene: pathlib.Path, folder: pathlib.Path, worker: Worker) -> None:
    """Runs a case in a copy of the scene."""
    copy = folder / "scene"
    shutil.copytree(scene, copy)
    case.prepare(copy)
    done = worker.run([word.replace("{s}", str(copy)) for word in case.command], cwd=copy)
    text = done.text.replace(f"{copy}/", "")
    assert done.status == case.status, text
    assert case.phrase in text
    assert "Traceback" not in done.text
    assert done.megabytes < case.megabytes
    assert not (copy / "executed").exists()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in bad_input.CASES])
def test_bad_input(case, scene, tmp_path, worker):
    check(case, scene, tmp_path, worker)


def test_the_table_of_bad_input_is_long_and_its_names_are_unique():
    names = [case.name for case in bad_input.CASES]
    assert len(set(names)) == len(names) >= 200


def test_a_damaged_workdir_is_resumed_equally_or_refused_by_name(scene):
    results = list(damage.campaign(scene))
    assert results
    wrong = [result for result in results if result.end not in ("equal", "refused")]
    assert not wrong, wrong


@pytest.mark.parametrize("seed", range(6))
def test_a_stopped_run_resumes_bit_for_bit(seed, scene):
    kill.train_with_stops(scene, seed, stops=3)


@pytest.mark.parametrize("seed", range(2))
def test_a_stopped_annotation_writes_the_same_files(seed, scene):
    kill.annotate_with_stops(scene, seed, stops=3)
