"""Statistics and Markdown tables of the studies of scripts/compare_token_labels.py.

Runs with the same seed are pairs: they have the same initialization, order of images and crops. Means have a
95 % bootstrap interval over the seeds, and an arm is compared with another by a paired t test.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from scripts.comparison_arms import STUDIES, Arm, Study

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {  # page -> its studies
    ROOT / "docs/results.md": tuple(STUDIES),
    ROOT / "README.md": ("main",),
}
BEGIN = "<!-- table of the study {}: scripts/compare_token_labels.py --table writes it -->"
END = "<!-- end of the table -->"
RESAMPLES = 10_000  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class ArmStatistics:
    """The accuracy of an arm over its seeds, in percent.

    Attributes:
      arm: name of the arm.
      count: number of seeds n.
      mean: mean accuracy.
      low, high: 95 % bootstrap interval of the mean; NaN with one seed.
      gain: mean paired difference to the baseline, in points; NaN without a baseline or common seeds.
      gain_low, gain_high: 95 % bootstrap interval of the gain; NaN with one pair.
      p_value: of the two-sided paired t test; NaN with fewer than two pairs.
    """

    arm: str
    count: int
    mean: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    p_value: float


def read_lines(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none if there is no file."""
    path = pathlib.Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def accuracies(lines: Sequence[Mapping[str, Any]], key: str = "ema") -> dict[str, dict[int, float]]:
    """arm -> seed -> top-1 or mIoU in percent.

    Args:
      lines: records of finished runs, from `read_lines`.
      key: "ema" (averaged weights) or "raw".
    """
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        found.setdefault(line["arm"], {})[line["seed"]] = line[key]
    return found


def statistics_of(arm: str, found: Mapping[str, Mapping[int, float]], *, baseline: str) -> ArmStatistics:
    """The statistics of an arm of `accuracies`, compared with the arm `baseline`; with none if it is empty.

    Example:
      >>> found = {"labels": {0: 70.0, 1: 72.0}, "aligned": {0: 75.0, 1: 79.0}}
      >>> statistics_of("aligned", found, baseline="labels").gain
      6.0
    """
    values = found[arm]
    seeds = sorted(set(values) & set(found.get(baseline, {})))
    pairs = [values[seed] - found[baseline][seed] for seed in seeds]
    low, high = bootstrap_interval(list(values.values()))
    gain_low, gain_high = bootstrap_interval(pairs)
    return ArmStatistics(
        arm=arm,
        count=len(values),
        mean=float(np.mean(list(values.values()))),
        low=low,
        high=high,
        gain=float(np.mean(pairs)) if pairs else float("nan"),
        gain_low=gain_low,
        gain_high=gain_high,
        p_value=float(stats.ttest_1samp(pairs, 0.0).pvalue) if len(pairs) > 1 else float("nan"),
    )


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean, with resamples of one seed; NaN below two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    interval = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=RESAMPLES, method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def table(lines: Sequence[Mapping[str, Any]], study: Study, arms: Mapping[str, Arm]) -> str:
    """The Markdown table of a study. A gain is over the seeds that an arm and its baseline have.

    Args:
      lines: records of runs, of which those of other arms and of further seeds are left out.
      study: what the table has.
      arms: the words of each arm. Arms without runs have no row.
    """
    found = accuracies([line for line in lines if line["seed"] < study.seeds])
    rows = [
        f"| student trained with | n | {study.metric}, % (95 % interval) | difference (95 % interval) | p |",
        "|---|---|---|---|---|",
    ]
    for arm, baseline in study.arms.items():
        if found.get(arm):
            rows.append(_row(arms[arm].words, statistics_of(arm, found, baseline=baseline)))
    return "\n".join(rows)


def write_tables(tables: Mapping[str, str], page: pathlib.Path) -> None:
    """Replaces the table of each study in a page, study -> table, where its mark stands.

    Raises:
      ValueError: the page does not have the mark of a study.
    """
    old = text = page.read_text()
    for name, rows in tables.items():
        mark = BEGIN.format(name)
        before, begin, rest = text.partition(mark)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"{page} has no table between {mark!r} and {END!r}.")
        text = f"{before}{begin}\n\n{rows}\n\n{end}{after}"
    if text != old:
        page.write_text(text)


def _row(name: str, s: ArmStatistics) -> str:
    mean = f"{s.mean:.1f}" + (f" ({s.low:.1f} to {s.high:.1f})" if s.count > 1 else "")
    gain = "" if np.isnan(s.gain) else f"{s.gain:+.1f}"
    if gain and not np.isnan(s.gain_low):
        gain += f" ({s.gain_low:+.1f} to {s.gain_high:+.1f})"
    p = "" if np.isnan(s.p_value) else ("< 0.001" if s.p_value < 0.001 else f"{s.p_value:.3f}")
    return f"| {name} | {s.count} | {mean} | {gain} | {p} |"
