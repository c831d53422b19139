"""Which arrays of a checkpoint a model takes: `fit_arrays`, its report, and the comparison of shapes."""

import types

import numpy as np
import pytest

from tlvit.checkpoints.fit import LoadReport, check_finite, check_same_shapes, fit_arrays

MODEL = types.SimpleNamespace(grid=None)
SHAPES = {"a": (2,), "b/c": (3, 4), "head": (5,)}


def arrays(**shapes):
    return {k.replace("_", "/"): np.zeros(shape) for k, shape in shapes.items()}


def test_arrays_that_fit():
    found = arrays(a=(2,), b_c=(3, 4), head=(5,))
    chosen, report = fit_arrays(MODEL, SHAPES, found)
    assert chosen.keys() == found.keys()
    assert all(chosen[k] is found[k] for k in found)
    assert report == LoadReport(("a", "b/c", "head"))


def test_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match="3 tensors do not fit") as caught:
        fit_arrays(MODEL, SHAPES, arrays(a=(2,), b_c=(4, 3), x=(1,)), allow="x/")
    assert str(caught.value).splitlines()[1:] == [
        "  b/c: is [4, 3], wanted [3, 4]",
        "  head: missing, wanted [5]",
        "  x: unexpected, [1]",
    ]


def test_arrays_that_may_differ():
    chosen, report = fit_arrays(MODEL, SHAPES, arrays(a=(2,), b_c=(4, 3), x=(1,)), allow=("b", "head", "x"))
    assert chosen.keys() == {"a"}
    assert report == LoadReport(("a",), reinitialized=("b/c", "head"), unexpected=("x",))


def test_arrays_that_may_be_missing_or_unexpected():
    """`missing` does not allow another shape or unexpected arrays, and `unexpected` nothing else."""
    shapes = {"head.weight": (5, 2), "aux_head.weight": (5, 2), "head_dist.weight": (4, 2), "norm": (2,)}
    found = {"head.weight": np.ones((5, 2)), "extra": np.zeros(1)}
    missing = ("aux_head", "head_dist", "norm")
    chosen, report = fit_arrays(MODEL, shapes, found, missing=missing, unexpected="extra")
    assert report == LoadReport(
        ("head.weight",),
        reinitialized=("head_dist.weight", "norm"),  # the class head has another shape
        unexpected=("extra",),
        copied=("aux_head.weight from head.weight",),
    )
    assert str(report).splitlines()[2] == "copied             1  aux_head.weight from head.weight"
    np.testing.assert_array_equal(chosen["aux_head.weight"], found["head.weight"])
    with pytest.raises(ValueError, match=r"extra: unexpected, \[1\]"):
        fit_arrays(MODEL, shapes, found, missing=(*missing, "extra"))
    with pytest.raises(ValueError, match=r"norm: is \[3\], wanted \[2\]"):
        fit_arrays(MODEL, shapes, found | {"norm": np.zeros(3)}, missing=missing, unexpected="extra")


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"\n  x29: unexpected, \[1\]\n  and 5 more$"):
        fit_arrays(MODEL, {}, {f"x{i}": np.zeros(1) for i in range(10, 35)})


def test_report_is_a_table():
    report = LoadReport(("a", "b"), ("pos_embed",), tuple(f"head{i}" for i in range(8)))
    assert str(report).splitlines() == [
        "loaded             2",
        "resized            1  pos_embed",
        "reinitialized      8  head0, head1, head2, head3, head4, head5, and 2 more",
        "unexpected         0",
    ]


def test_shapes_of_a_run():
    check_same_shapes(SHAPES, dict(SHAPES), "x")
    with pytest.raises(ValueError, match=r"^x belongs to another model or optimizer, 2 arrays") as caught:
        check_same_shapes(SHAPES, {"a": (2,), "b/c": (3, 5), "head": (5,), "z": (1,)}, "x")
    assert str(caught.value).splitlines()[1:] == [
        "  b/c: saved (3, 5), this run (3, 4)",
        "  z: saved (1,), this run nothing",
    ]


def test_finite_values():
    good = {"a": np.arange(3.0), "b": np.zeros((), np.int32), "c": np.zeros((0, 2))}
    check_finite(good, "x")
    bad = {name: np.array([1, np.nan, np.inf, -np.inf]) for name in "efgh"}
    with pytest.raises(ValueError, match=r"^x is not usable: 3 of 4 values of e, 3 of 4") as caught:
        check_finite({**good, **bad}, "x")
    assert "3 of 4 values of g, and values of 1 other tensors are NaN or infinite" in str(caught.value)
