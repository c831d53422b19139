"""The folders of a run's checkpoints, one for each saved step, and the JSON records in them."""

import json
import logging
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from tlvit.checkpoints.native.checksums import check_files, replace_files
from tlvit.files import is_local
from tlvit.records import read_json

# Orbax renames a folder when all of its files are written. In a bucket it writes COMMITTED last instead.
INCOMPLETE, COMMITTED = "*.orbax-checkpoint-tmp*", "commit_success.txt"
RECORD, SCORE = "extra/metadata", "metrics/metrics"
NO_SCORE = -1.0  # the step was not evaluated

log = logging.getLogger("tlvit")


def complete_steps(folder: pathlib.Path) -> list[int]:
    """The steps with a complete checkpoint, ascending; empty if there is no such folder."""
    found = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else ()
    complete = lambda path: path.is_dir() if is_local(path) else (path / COMMITTED).exists()
    return sorted(int(path.name) for path in found if complete(path))


def remove_incomplete(folder: pathlib.Path) -> None:
    """Removes the incomplete checkpoints of killed runs. Only the run that has the workdir may do so."""
    for path in folder.glob(INCOMPLETE):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        log.info("removed %s, an incomplete checkpoint of a killed run", path)


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """The JSON record that was saved with a step.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged.
    """
    check_files(folder, RECORD)
    return read_json(folder / RECORD)


def read_score(folder: pathlib.Path) -> float:
    """The score of a step; NO_SCORE if it has none or if the file of the score is damaged."""
    if not (folder / SCORE).exists():
        return NO_SCORE
    try:
        check_files(folder, SCORE)
        score = float(read_json(folder / SCORE)["score"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the score of the checkpoint %s is unknown: %s", folder.name, error)
        return NO_SCORE
    return score if math.isfinite(score) else NO_SCORE


def replace_records(folder: pathlib.Path, *, score: float, extra: Mapping[str, Any]) -> None:
    """Replaces the score and the JSON record of a complete checkpoint."""
    replace_files(folder, {RECORD: json.dumps(dict(extra)), SCORE: json.dumps({"score": score})})
