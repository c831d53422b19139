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


def test_freed_memory_is_used_again():
    """Page faults of a process that allocates 32 MB five times, in pages of at least 4 KB."""
    code = (
        "import ctypes, resource, sys; from tlvit.host_memory import keep_freed_memory\n"
        "sys.exit(0) if not keep_freed_memory() else None\n"
        "size = 2**25; bytearray(size)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): ctypes.memset((ctypes.c_char * size).from_buffer(bytearray(size)), 1, size)\n"
        "faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "sys.exit(faults > size // 4096 // 4)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
