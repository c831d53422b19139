"""tlvit.host_memory: the limit of a container counts, batches must fit, and freed memory is used again."""

import subprocess
import sys

import pytest

from tlvit import host_memory


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "LIMIT_FILES", ())
    machine = host_memory.host_memory()
    assert machine > 2**28
    for text, expected in (("max\n", machine), ("1048576\n", 2**20), (str(2**62), machine)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(host_memory, "LIMIT_FILES", (str(tmp_path / "none"), str(tmp_path / "limit")))
        assert host_memory.host_memory() == expected


def test_batches_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(host_memory, "host_memory", lambda: 2**30)
    host_memory.check_batch(1000, (224, 224), "eval.batch_size")
    message = (
        r"4 batches of 2000 images of 224 x 224 pixels take 1.1 GiB, and this host has 1.0 GiB. "
        "Choose a smaller eval.batch_size or image size"
    )
    with pytest.raises(ValueError, match=message):
        host_memory.check_batch(2000, (224, 224), "eval.batch_size")


THREAD = """
import ctypes, resource, sys, threading
from tlvit.host_memory import keep_freed_memory

SIZE = 2**27  # larger than the 64 MB that glibc's arenas of threads can hold


def use():
    ctypes.memset((ctypes.c_char * SIZE).from_buffer(bytearray(SIZE)), 1, SIZE)


def work():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


if not keep_freed_memory():
    sys.exit("the C library is not glibc")
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_freed_memory_of_a_thread_is_used_again():
    """Page faults, of at least 4 KB each, of a thread that allocates 128 MB five times."""
    run = subprocess.run([sys.executable, "-c", THREAD], capture_output=True, text=True)
    if "not glibc" in run.stderr:
        pytest.skip(run.stderr)
    assert int(run.stdout) < 2**27 // 4096 // 4


PLATFORMS = """
import jax
from tlvit import host_memory

for platforms in ("cuda", "tpu,cpu", None):
    jax.config.update("jax_platforms", platforms)
    host_memory.PLUGINS = ("json",)  # a package that is there
    print(host_memory.keep_freed_memory())
"""


def test_nothing_is_changed_where_jax_may_find_an_accelerator():
    run = subprocess.run([sys.executable, "-c", PLATFORMS], capture_output=True, text=True)
    assert run.stdout.split() == ["False"] * 3, run.stderr
