"""Writes the predictions of many images as a CSV or JSON file, while they are made."""

import csv
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

ENDINGS = (".csv", ".json")
SECONDS = 10.0  # between two lines of progress


def check_ending(path: str) -> None:
    """Raises ValueError unless a path ends in .csv or .json."""
    if not path.endswith(ENDINGS):
        raise ValueError(f"Predictions of a classifier are written to a .csv or .json file, not to {path}.")


def write_predictions(path: str, records: Iterable[dict[str, Any]], *, top: int) -> tuple[int, int]:
    """Writes records as they come. A process that is stopped leaves the images before in a CSV file.

    Args:
      path: FILE.csv with the columns image, error, class_1, name_1, probability_1, class_2 and so on; or
        FILE.json with a list of records.
      records: {"image", "error"} or {"image", "top": [{"class", "name", "probability"}, …]}.
      top: number of classes in a row of the CSV file.

    Returns:
      The number of images and of those with an error.
    """
    done, errors = 0, 0
    with pathlib.Path(path).open("w", encoding="utf-8", newline="") as file:
        write = _write_csv if path.endswith(".csv") else _write_json
        for record in write(file, records, top):
            done, errors = done + 1, errors + ("error" in record)
    return done, errors


def progress(records: Iterable[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """The records; prints how many there were to standard error from time to time."""
    start = last = 0.0
    for done, record in enumerate(records, 1):
        yield record
        now = time.monotonic()
        if done == 1:  # the time before it is that of loading and compiling
            start = last = now
        elif now - last > SECONDS:
            last, rate = now, (done - 1) / (now - start)
            left = (total - done) / rate / 60
            print(f"{done} of {total} images, {rate:.0f} images/s, {left:.0f} min left", file=sys.stderr)


def _write_csv(file: Any, records: Iterable[dict[str, Any]], top: int) -> Iterator[dict[str, Any]]:
    writer = csv.writer(file)
    columns = [f"{name}_{k}" for k in range(1, top + 1) for name in ("class", "name", "probability")]
    writer.writerow(["image", "error", *columns])
    for record in records:
        cells = [cell for score in record.get("top", []) for cell in score.values()]
        empty = [""] * (len(columns) - len(cells))
        writer.writerow([record["image"], record.get("error", ""), *cells, *empty])
        file.flush()
        yield record


def _write_json(file: Any, records: Iterable[dict[str, Any]], top: int) -> Iterator[dict[str, Any]]:
    del top
    file.write("[")
    separator = "\n"
    for record in records:
        file.write(f"{separator}{json.dumps(record)}")
        separator = ",\n"
        yield record
    file.write("\n]\n")
