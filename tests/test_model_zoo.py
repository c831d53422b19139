"""The model zoo: counted sizes, published results with sources, and commands that are understood."""

import re
import shlex

import pytest

from tlvit import convert, list_models, model_zoo
from tlvit.published import PUBLISHED, find, sides


def test_rows_have_counts_rule_and_published_result():
    text = model_zoo.tables(["lvvit_t", "deit_tiny_distilled_patch16_224", "t2t_vit_7", "regnety_002"])
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "LV-ViT", "T2T-ViT", "DeiT", "RegNetY, annotators and teachers"
    ]  # fmt: skip
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [
        "| `lvvit_t` | 224 | 8.5 M | 2.9 G | 34 MB | max | 0.9 | 79.1 | linked |",
        "| `t2t_vit_7` | 224 | 4.3 M | 1.1 G | 17 MB | class | 0.9 | 71.7 "
        "| `71.7_T2T_ViT_7.pth.tar`, release main |",
        "| `deit_tiny_distilled_patch16_224` | 224 | 5.9 M | 1.3 G | 24 MB | mean of two | 0.875 | 74.5 "
        "| `deit_tiny_distilled_patch16_224-b40b3cf7.pth` |",
        "| `regnety_002` | 224 | 3.2 M | 0.2 G | 13 MB | pool | 0.875 |  | none |",
    ]
    assert "Accuracies: Yuan et al. 2021, arXiv:2101.11986" in text
    assert "Weights: github.com/yitu-opensource/T2T-ViT." in text
    commands = re.findall(r"^tlvit convert (.*)$", text, re.MULTILINE)
    assert len(commands) == 2  # none for a file without a name
    for command in commands:
        convert._parse(shlex.split(command))


def test_published_results_are_found_by_model_and_size():
    assert find("lvvit_m", 448).top1 == 85.5
    assert find("lvvit_m", 449) is None
    assert sides("lvvit_m") == [224, 384, 448]
    assert len({(entry.model, entry.side) for entry in PUBLISHED}) == len(PUBLISHED)
    for entry in PUBLISHED:
        assert "arXiv:" in entry.source
        assert entry.release[0], entry
        # The authors of LV-ViT and T2T-ViT put the accuracy into the name of the file.
        if entry.top1 and "TokenLabeling" in entry.release[0] and entry.file:
            assert f"-{entry.side}-{entry.top1}.pth.tar" in entry.file
        if "T2T-ViT" in entry.release[0]:
            assert entry.file.startswith(f"{entry.top1}_")


@pytest.mark.slow
def test_all_models_are_in_the_zoo():
    """All names with a size of their own."""
    listed = set(re.findall(r"^\| `(\w+)`", model_zoo.tables(), re.MULTILINE))
    assert listed == set(list_models()) - {"upernet"}
