"""tlvit.host_memory: the limit of a container counts, batches must fit, and freed memory is used again."""

import os
import subprocess
import sys

import jax
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


KEEP = """
import resource, sys
from tlvit.host_memory import keep_freed_memory, release_freed_memory
sys.exit(0) if not keep_freed_memory(16, (224, 224)) else None
import jax, jax.numpy as jnp

def resident():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmRSS")).split()[1]) * 1024

size = 2**27  # bytes of each temporary array of the program
step = jax.jit(lambda x: jnp.cumsum(jnp.sin(x))[-1])
x = jnp.ones(size // 4)
for _ in range(2): step(x).block_until_ready()
"""


@pytest.mark.parametrize(
    "check",
    [
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(4): step(x).block_until_ready()\n"
        "faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "assert faults < size // 4096, faults",  # the pages of one array; each step fills at least one
        "before = resident(); release_freed_memory()\n"
        "assert before - resident() > size // 2, (before, resident())",
    ],
    ids=["kept", "released"],
)
def test_freed_memory(check):
    """A program for a CPU computes in the memory of its last call, until that is released."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    assert subprocess.run([sys.executable, "-c", KEEP + check], env=environment).returncode == 0


@pytest.mark.parametrize(
    ("batch_size", "chosen"), [(10, []), (11, [("jax_cpu_enable_async_dispatch", False)])]
)
def test_only_large_batches_are_computed_in_the_main_thread(batch_size, chosen, monkeypatch):
    found = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: found.append(setting))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # leaves the memory of this process as it is
    assert not host_memory.keep_freed_memory(batch_size, (224, 224))
    assert found == chosen
