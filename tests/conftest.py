"""Test settings (eight CPU devices, rank promotion raises, shapes of annotated functions are checked), random
arrays and the goldens' fill rule."""

import atexit
import logging
import os
import shutil
import tempfile
import zlib

from xla_flags import xla_flags

# Equal programs are compiled once by all processes of a run. Set before the first import of JAX; worker
# processes inherit it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tlvit-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import fcntl
import gc
import pathlib
import sys

import jax
import numpy as np
import pytest
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")

# Test files import the helpers below as `conftest`: the same module, not a second copy of it.
sys.modules["conftest"] = sys.modules[__name__]

# Before the first import of tlvit: a call with an array of another type or shape than annotated raises.
install_import_hook(["tlvit.ops", "tlvit.models"], "type_checker.check")

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


def pytest_collection_finish():
    """What is imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    """The folder of `tiny_runs.build_scene`, made once for all processes of a test run. It is not changed."""
    import tiny_runs

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with (folder / "scene.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "scene").exists():
            tiny_runs.build_scene(folder / "scene")
    return folder / "scene"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder behind gs://bucket/: a local file system in place of Google's, for `etils.epath` only."""
    from etils.epath import backend, gpath

    local = lambda path: os.fspath(path).replace("gs://", f"{tmp_path}/gs/")
    remote = lambda path: path.replace(f"{tmp_path}/gs/", "gs://")

    class Below(type(backend.os_backend)):
        """Local files, below another folder."""

        def glob(self, path):
            return [remote(found) for found in super().glob(local(path))]

    for name in ("open", "exists", "isdir", "listdir", "makedirs", "mkdir", "remove"):
        method = getattr(type(backend.os_backend), name)
        setattr(Below, name, lambda self, path, *a, method=method, **k: method(self, local(path), *a, **k))
    monkeypatch.setattr(gpath.PosixGPath, "_backend", property(lambda self: Below()))
    (tmp_path / "gs" / "bucket").mkdir(parents=True)
    return tmp_path / "gs" / "bucket"


def randn(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def images(batch: int = 2, height: int = 32, width: int | None = None, seed: int = 0) -> np.ndarray:
    """Random "normalized" images, float32 [batch, height, width, 3]; square without a width."""
    return randn(batch, height, width or height, 3, seed=seed)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    return np.exp(log_softmax(x))


def soft_targets(seed: int, *shape: int) -> np.ndarray:
    """Random distributions over the last axis, float32."""
    return softmax(2 * randn(*shape, seed=seed)).astype(np.float32)


def refuse_folders(monkeypatch, part: str) -> None:
    """From now on, no folder can be made whose path has this part."""
    make = os.makedirs

    def refusing(path, *args, **options):
        if part in str(path):
            raise PermissionError(1, "Operation not permitted", str(path))
        return make(path, *args, **options)

    monkeypatch.setattr(os, "makedirs", refusing)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values that the goldens' models had: a function of a tensor's official name
    (tests/golden/README.md)."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        x = 1 + 0.2 * abs(x)
    elif last == "running_mean":
        x = 0.1 * x
    elif last in ("cls_token", "dist_token", "pos_embed"):
        x = 0.5 * x
    elif last == "bias" or last.endswith("_bias"):
        x = 0.1 * x
    elif len(shape) <= 1:
        x = 1 + 0.1 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:]))
    return x.astype(np.float32)


def fill_model(model) -> None:
    """Fills a model by the rule, through the conversion that users rely on."""
    from tlvit.checkpoints.torch_names import from_torch, to_torch

    names = to_torch(model)
    tensors = {k: v if k.endswith("num_batches_tracked") else fill(k, v.shape) for k, v in names.items()}
    from_torch(model, tensors)


def golden_images(seed: int, batch: int, size: int) -> np.ndarray:
    """The goldens' "normalized" images, as NHWC."""
    images = np.random.RandomState(seed).standard_normal((batch, 3, size, size)).astype(np.float32)
    return images.transpose(0, 2, 3, 1)


def golden_target(seed: int, batch: int, classes: int, tokens: int) -> np.ndarray:
    """The goldens' random targets [B, L, 2 + N]: label, class token, tokens."""
    noise = np.random.RandomState(seed).standard_normal((batch, classes, 2 + tokens)).astype(np.float32)
    t = np.exp(2 * noise)
    return t / t.sum(1, keepdims=True)


@pytest.fixture(autouse=True)
def restore_logging():
    """Restores the handlers and the level of tlvit's log after every test; commands change them."""
    log = logging.getLogger("tlvit")
    before = (log.handlers[:], log.propagate, log.level)
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.fixture
def unchecked_shapes():
    """Turns the checks of annotations off, for tests of a function's own errors."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def golden():
    """Loads a golden file of tests/golden by name."""
    return lambda name: np.load(GOLDEN / name)
