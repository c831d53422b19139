"""Tests of reading torch.save files without torch: equal to what torch reads, and tensors only."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from tlvit.data.score_maps.published_files import read_tensor

torch = pytest.importorskip("torch")


def saved(thing, **options):
    buffer = io.BytesIO()
    torch.save(thing, buffer, **options)
    return buffer.getvalue()


def score_map():
    rng = np.random.RandomState(0)
    return torch.tensor(
        np.stack([rng.standard_normal((5, 18, 18)), rng.randint(1000, size=(5, 18, 18))])
    ).half()


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "int32", "uint8", "int16"])
def test_tensors_are_read_as_torch_reads_them(new, dtype):
    tensor = score_map().abs().to(getattr(torch, dtype))
    found = read_tensor(saved(tensor, _use_new_zipfile_serialization=new), "a.pt")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, tensor.numpy())


@pytest.mark.parametrize("new", [True, False])
def test_views_of_larger_storages_are_read_as_torch_reads_them(new):
    batch = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    for view in (batch[1], batch[:, 1:, ::2], batch.permute(3, 1, 0, 2), batch[0, 0, 0, 0], batch[:0]):
        found = read_tensor(saved(view, _use_new_zipfile_serialization=new), "a.pt")
        np.testing.assert_array_equal(found, view.numpy())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_file_raises_an_error_and_does_not_run(tmp_path, new):
    content = saved({"x": Evil(str(tmp_path / "run"))}, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"a.pt is not a readable tensor: it refers to posix.mkdir"):
        read_tensor(content, "a.pt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["torch.load", "torch._utils._rebuild_parameter", "builtins.eval", "torch.Tensor"]
)
def test_other_names_of_torch_and_python_raise_an_error(name):
    module, _, attribute = name.rpartition(".")
    code = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", code)
    with pytest.raises(ValueError, match=f"it refers to {name}"):
        read_tensor(buffer.getvalue(), "a.pt")


@pytest.mark.parametrize(
    ("thing", "match"),
    [
        ({"a": torch.ones(2)}, "object of type dict, not a tensor"),
        ([torch.ones(2)], "object of type list, not a tensor"),
        (7, "object of type int, not a tensor"),
        (torch.nn.Parameter(torch.ones(2)), "_rebuild_parameter"),
        (torch.ones(2, dtype=torch.complex64), "ComplexFloatStorage"),
    ],
)
def test_other_objects_raise_an_error(thing, match):
    with pytest.raises(ValueError, match=match):
        read_tensor(saved(thing), "a.pt")


def rezipped(content, change):
    """The zip file with some of its entries changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def test_a_view_beyond_its_storage_raises_an_error():
    content = saved(torch.ones(4))
    inner = lambda name, data: (
        data.replace(b"K\x00K\x04\x85", b"K\x02K\x04\x85") if name.endswith("pkl") else data
    )
    assert rezipped(content, inner) != content
    with pytest.raises(ValueError, match="ends at number 5 of a storage of 4"):
        read_tensor(rezipped(content, inner), "a.pt")


def test_damage_raises_an_error():
    content = saved(score_map())
    short = lambda name, data: data[:-2] if name.endswith("data/0") else data
    with pytest.raises(ValueError, match="storage 0 has 6478 bytes instead of 6480"):
        read_tensor(rezipped(content, short), "a.pt")
    for damaged in (content[:-100], content[:200], b"", b"PK", b"hello", pickle.dumps(3), pickle.dumps([1])):
        with pytest.raises(ValueError, match=r"a.pt is not a readable tensor"):
            read_tensor(damaged, "a.pt")
    old = saved(score_map(), _use_new_zipfile_serialization=False)
    for cut in (1, 1000, len(old) - 30):
        with pytest.raises(ValueError, match=r"a.pt is not a readable tensor"):
            read_tensor(old[:-cut], "a.pt")
