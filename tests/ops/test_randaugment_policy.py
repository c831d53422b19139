"""RandAugment's policy strings."""

import pytest

from tlvit.ops.randaugment_policy import AugmentPolicy, parse_policy


def test_policies_are_read():
    assert parse_policy("") is None
    assert parse_policy("rand-m9-mstd0.5-inc1") == AugmentPolicy(9, 2, 0.5)
    assert parse_policy("rand-n3-inc1-m7") == AugmentPolicy(7, 3, 0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("augmix-m3", "'augmix'"),
        ("rand-m9-q3-inc1", "'q3'"),
        ("rand-m9-mstd-inc1", "'mstd'"),
        ("rand-m11-inc1", "'m11'"),
        ("rand-m9-n0-inc1", "'n0'"),
        ("rand-m9-n2.5-inc1", "'n2.5'"),
        ("rand-m9-inc0", "'inc0'"),
        ("rand-m9-m8-inc1", "'m8'"),
        ("rand-m9", "'inc1'"),
        ("rand-inc1", "'m9'"),
    ],
)
def test_a_wrong_piece_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        parse_policy(text)
