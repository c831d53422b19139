"""Statistics and table of the comparison, and that the pages have the table of the stored results."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from scripts import comparison_table
from scripts.compare_token_labels import ROOT, current_lines
from scripts.comparison_arms import ARMS, STUDIES, Arm, Study
from scripts.comparison_table import (
    accuracies,
    bootstrap_interval,
    read_lines,
    statistics_of,
    table,
    write_tables,
)

RESULTS = ROOT / "docs/results/token_labels.jsonl"
LABELS, ALIGNED = (70.0, 72.0, 71.0, 69.0), (75.0, 79.0, 74.0, 73.0)


def lines(**arms):
    return [
        {"arm": arm, "seed": seed, "ema": top1, "raw": top1 - 1}
        for arm, values in arms.items()
        for seed, top1 in enumerate(values)
    ]


def test_statistics_of_pairs():
    found = accuracies(lines(labels=LABELS, aligned=ALIGNED))
    s = statistics_of("aligned", found, baseline="labels")
    gains = np.subtract(ALIGNED, LABELS)
    assert (s.count, s.mean, s.gain) == (4, 75.25, 4.75)
    # t = mean / (standard deviation / sqrt(n)) with n - 1 degrees of freedom, two-sided.
    t = gains.mean() / (gains.std(ddof=1) / math.sqrt(4))
    assert s.p_value == pytest.approx(2 * stats.t.sf(t, 3))
    assert min(gains) <= s.gain_low < 4.75 < s.gain_high <= max(gains)
    assert min(ALIGNED) <= s.low < 75.25 < s.high <= max(ALIGNED)
    baseline = statistics_of("labels", found, baseline="")
    assert math.isnan(baseline.gain)
    assert math.isnan(baseline.p_value)


def test_the_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = bootstrap_interval(list(values))
    margin = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - margin, values.mean() + margin), abs=0.03)
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])
    assert all(math.isnan(v) for v in bootstrap_interval([5.0]))


def test_a_gain_is_over_the_common_seeds():
    found = accuracies(lines(labels=LABELS, aligned=ALIGNED[:2]))
    s = statistics_of("aligned", found, baseline="labels")
    assert (s.count, s.mean, s.gain) == (2, 77.0, 6.0)  # of seeds 0 and 1
    assert statistics_of("labels", found, baseline="").count == 4
    raw = accuracies(lines(labels=LABELS), "raw")
    assert raw["labels"] == {seed: top1 - 1 for seed, top1 in enumerate(LABELS)}


def test_the_table_has_a_row_for_each_arm_with_runs():
    arms = {name: Arm(name) for name in ("labels", "aligned", "missing")}
    study = Study({"labels": "", "aligned": "labels", "missing": "labels"}, seeds=4, metric="mIoU")
    head, _, *rows = table(lines(labels=LABELS, aligned=ALIGNED), study, arms).splitlines()
    assert "| mIoU, % (95 % interval) |" in head
    assert len(rows) == 2
    assert re.fullmatch(r"\| labels \| 4 \| 70\.5 \(\d\d\.\d to \d\d\.\d\) \|  \|  \|", rows[0])
    assert re.fullmatch(
        r"\| aligned \| 4 \| 75\.2 \(\d+\.\d to \d+\.\d\) \| \+4\.8 \(\+\d\.\d to \+\d\.\d\) \| 0\.\d+ \|",
        rows[1],
    )
    one = table(lines(labels=LABELS, aligned=ALIGNED), Study(study.arms, seeds=1), arms).splitlines()[2:]
    assert one == ["| labels | 1 | 70.0 |  |  |", "| aligned | 1 | 75.0 | +5.0 |  |"]
    row = table(lines(labels=LABELS[:1], aligned=ALIGNED), study, arms).splitlines()[-1]
    assert row.endswith(") | +5.0 |  |")  # of one pair


def test_pages_without_marks_are_refused(tmp_path):
    page = tmp_path / "page.md"
    marks = [comparison_table.BEGIN.format(name) for name in ("a", "b")]
    end = comparison_table.END
    page.write_text(f"x\n{marks[0]}\nold\n{end}\ny\n{marks[1]}\n\n{end}\nz\n")
    write_tables({"a": "| new |", "b": "| b |"}, page)
    assert page.read_text() == (f"x\n{marks[0]}\n\n| new |\n\n{end}\ny\n{marks[1]}\n\n| b |\n\n{end}\nz\n")
    with pytest.raises(ValueError, match="has no table between"):
        write_tables({"a": "| newer |", "c": "| c |"}, page)
    assert "| new |" in page.read_text()  # nothing is written


PLACES = [(page, name) for page, names in comparison_table.PAGES.items() for name in names]


@pytest.mark.parametrize(("page", "name"), PLACES, ids=[f"{page.name} {name}" for page, name in PLACES])
def test_the_pages_have_the_tables_of_the_stored_results(page, name):
    """A table that was edited by hand, or results that were added without --table."""
    text = page.read_text().partition(comparison_table.BEGIN.format(name))[2]
    shown = text.partition(comparison_table.END)[0].strip()
    assert shown == table(current_lines(read_lines(RESULTS)), STUDIES[name], ARMS)


def test_the_stored_results_are_complete_records():
    found = read_lines(RESULTS)
    assert found
    keys = {(line["arm"], line["seed"], line["settings"]) for line in found}
    assert len(keys) == len(found), "a run is there twice"
    assert len(current_lines(found)) == len(found), "a run has settings that the recipe does not have now"
    for line in found:
        assert line["arm"] in ARMS
        assert 0 <= line["raw"] <= 100
        epoch, raw, ema = line["curve"][-1]
        assert (raw, ema) == (line["raw"], line["ema"])
        assert epoch > 0
