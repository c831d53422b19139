"""Numbers of the pages follow from their sources: computed hours, published accuracies and stored results."""

import re
import statistics

import pytest
from conftest import ROOT

from scripts.program_costs import CHIPS
from tlvit import published

ROW = re.compile(r"^\| `([\w:]+)`(.*?) \|(.*)\|$", re.MULTILINE)
UTILIZATION = 0.4
MACHINES = (("TPU v5e", 8), ("TPU v4", 16), ("NVIDIA A100", 8), ("NVIDIA H100", 8))


def rows(page):
    """(recipe, the words after it, the other cells) of the table rows of a page that begin with a name."""
    for name, words, cells in ROW.findall((ROOT / page).read_text()):
        yield name, words, [cell.strip() for cell in cells.split("|")]


def hours_table():
    """The rows of the first table of the expectations."""
    return (row for row in rows("docs/expectations.md") if len(row[2]) == 10)


def number(text):
    return float(text.replace(",", ""))


def test_hours_follow_from_the_operations():
    found = list(hours_table())
    assert len(found) >= 15
    for recipe, _, cells in found:
        epochs, images, gflop, eflop, *hours, rate, _ = cells
        flop = sum(map(number, gflop.split(" + "))) * 1e9
        total = number(epochs) * 1_281_167 * flop
        assert number(images) == round(number(epochs) * 1.281167), recipe
        assert number(eflop) == pytest.approx(total / 1e18, rel=0.02)
        for text, (chip, count) in zip(hours, MACHINES, strict=True):
            alone, together = re.fullmatch(r"([\d.,]+) \(([\d.,]+)\)", text).groups()
            computed = total / (count * CHIPS[chip][0] * UTILIZATION) / 3600
            assert number(alone) == pytest.approx(computed, rel=0.03, abs=0.06), (recipe, chip)
            assert number(together) == pytest.approx(computed * count, rel=0.03, abs=0.06), (recipe, chip)
        assert number(rate) == pytest.approx(8 * CHIPS["TPU v5e"][0] * UTILIZATION / flop, rel=0.03)


def test_published_accuracies_of_the_expectations():
    for recipe, words, cells in hours_table():
        model, side = recipe.rpartition(":")[2], re.search(r"at (\d+)", words)
        found = published.find(model, int(side[1]) if side else 224)
        assert cells[-1] == (f"{found.top1:.1f}" if found else ""), recipe


def test_published_accuracies_of_the_readme():
    """Each accuracy of the table of models is one of those that tlvit.published has a source for."""
    text = (ROOT / "README.md").read_text().partition("## Models")[2].partition("\n## ")[0]
    accuracies = {entry.top1 for entry in published.PUBLISHED}
    lines = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    assert len(lines) >= 5
    for line in lines:
        shown = [float(x) for x in re.findall(r"\d+\.\d", line.split("|")[4])]
        assert shown, line
        assert set(shown) <= accuracies, line


def test_published_accuracies_of_the_recipes():
    for recipe, _, cells in rows("docs/recipes.md"):
        if "CIFAR" in cells[-1] or "mIoU" in cells[-1]:
            continue  # of another data set or task
        shown = [float(x) for x in re.findall(r"\d+\.\d", cells[-1])]
        assert set(shown) <= {entry.top1 for entry in published.PUBLISHED}, recipe


def test_means_of_the_three_seeds_of_version_0_1():
    """They follow from its seeds."""
    text = (ROOT / "docs/results.md").read_text()
    found = re.findall(r"^\| (.*) \| ([\d.]+(?: / [\d.]+)+) \| (.*) \|$", text, re.MULTILINE)
    assert len(found) == 3
    for _, seeds, shown in found:
        values = [float(x) for x in seeds.split(" / ")]
        mean, deviation = shown.strip("*").split(" ± ")
        assert float(mean) == pytest.approx(statistics.mean(values), abs=0.051)
        assert float(deviation) == pytest.approx(statistics.stdev(values), abs=0.051)
