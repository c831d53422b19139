"""Reads a tensor from a file written by torch.save, without torch and without running code in the file."""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np

DTYPES = {
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
}
MAX_BYTES = 1 << 28  # largest tensor in bytes, far above the size of a score map
LoadStorage = Callable[[str, np.dtype, int], np.ndarray]  # key, type, count -> the storage
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in a file written before torch 1.6


def read_tensor(content: bytes, name: str) -> np.ndarray:
    """Reads the tensor in a file of torch.save, of either format (zip, or the one before torch 1.6).

    The pickle in the file may refer to torch's storage types, to its function that builds a tensor from a
    storage, and to OrderedDict. Any other reference raises an error before it is called.

    Args:
      content: bytes of the file.
      name: name of the file, for messages.

    Returns:
      The tensor.

    Raises:
      ValueError: the file is damaged or was not written by torch.save, its object is not one tensor, or its
        pickle refers to anything else.
    """
    try:
        tensor = _read_zip(content) if content[:2] == b"PK" else _read_legacy(content)
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(f"{name} is not a readable tensor: {error}") from error
    if not isinstance(tensor, np.ndarray):
        raise ValueError(f"{name} has an object of type {type(tensor).__name__}, not a tensor")
    return tensor


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors only."""

    def __init__(self, file: IO[bytes], load_storage: LoadStorage):
        super().__init__(file)
        self.load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in DTYPES:
            return _StorageType(DTYPES[name])
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of a tensor")

    def persistent_load(self, pid: tuple) -> np.ndarray:
        kind, storage_type, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError(f"it refers to {kind!r}, which is not a storage")
        if not 0 <= count * storage_type.dtype.itemsize <= MAX_BYTES:
            raise pickle.UnpicklingError(f"its storage has {count} numbers, more than {MAX_BYTES} bytes")
        view = pid[5] if len(pid) > 5 else None
        if view is not None:
            raise pickle.UnpicklingError("its storage is a view of another one")
        return self.load_storage(str(key), storage_type.dtype, count)


class _StorageType:
    """Replaces a storage type of torch. It cannot be called."""

    def __init__(self, dtype: str):
        self.dtype = np.dtype(dtype)


def _read_zip(content: bytes) -> Any:
    """Unpickles the object of a zip file, the format since torch 1.6."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        pickles = [name for name in sizes if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} pickles instead of one")
        root = pickles[0][: -len("data.pkl")]
        if sizes.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")

        def load_storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            name = f"{root}data/{key}"
            if sizes.get(name) != count * dtype.itemsize:
                raise ValueError(
                    f"storage {key} has {sizes.get(name)} bytes instead of {count * dtype.itemsize}"
                )
            return np.frombuffer(archive.read(name), dtype)

        if sizes[pickles[0]] > 1 << 20:
            raise ValueError(f"its pickle has {sizes[pickles[0]]} bytes, far more than one tensor's")
        return _TensorUnpickler(io.BytesIO(archive.read(pickles[0])), load_storage).load()


def _read_legacy(content: bytes) -> Any:
    """Unpickles the object of a file from before torch 1.6.

    The file has five pickles: a magic number, a version, the machine's byte order, the object and the keys of
    its storages. The bytes of the storages follow.
    """
    file = io.BytesIO(content)
    storages: dict[str, np.ndarray] = {}

    def load_storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if key not in storages:
            if count * dtype.itemsize > len(content):
                raise ValueError(f"storage {key} has {count} numbers, more than the file")
            storages[key] = np.zeros(count, dtype)  # filled below
        return storages[key]

    def load() -> Any:
        return _TensorUnpickler(file, load_storage).load()

    if load() != LEGACY_MAGIC:
        raise ValueError("it does not begin as a file of torch.save")
    load()
    if not load().get("little_endian", True):
        raise ValueError("its numbers are big-endian")
    tensor, keys = load(), load()
    for key in keys:
        storage = storages[str(key)]
        count = int(np.frombuffer(file.read(8), "<i8")[0])
        if count != len(storage):
            raise ValueError(f"storage {key} has {count} numbers instead of {len(storage)}")
        storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
    return tensor


def _rebuild(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    """Builds torch's strided view of a storage, after a check that it lies within the storage."""
    if not isinstance(storage, np.ndarray) or len(size) != len(stride):
        raise pickle.UnpicklingError("its tensor is not described as torch does")
    if min((offset, *size, *stride), default=0) < 0:
        raise pickle.UnpicklingError("its tensor has a negative size, stride or offset")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset
    if all(size) and last >= len(storage):
        raise pickle.UnpicklingError(f"its tensor ends at number {last} of a storage of {len(storage)}")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), steps, writeable=False)
