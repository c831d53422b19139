"""Collectives are counted from the text of a compiled program; devices of a topology may be GPUs."""

import pathlib
import types

import pytest
from jax.experimental import topologies

from scripts import program_costs

H100 = pathlib.Path(__file__).parents[2] / "scripts/h100_sxm.txtpb"

TEXT = """
ENTRY %main {
  %p = f32[8,4]{1,0} parameter(0), metadata={op_name="all-reduce(x)"}
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%p), channel_id=1, to_apply=%add
  %all-reduce.2 = (f32[3]{0}, bf16[2,2]{1,0}) all-reduce(%a, %b), to_apply=%add
  %use = f32[8,4]{1,0} add(%all-reduce.1, %all-reduce.1)
  %g = pred[16]{0} all-gather(%q), dimensions={0}
  %s = f32[] all-reduce-start(%l), to_apply=%add
  %d = f32[] all-reduce-done(%s)
}
"""


def test_collectives_are_counted_from_the_programs_text():
    assert program_costs.count_collectives(TEXT) == {
        "all-reduce": {"count": 3, "bytes": 4 * 32 + (4 * 3 + 2 * 4) + 4},
        "all-gather": {"count": 1, "bytes": 16},
    }


def test_asynchronous_collectives_count_their_result_once():
    """On TPUs and GPUs an all-gather is started and finished; its start names operand and result."""
    text = """
  %s = (f32[2]{0}, f32[16]{0}) all-gather-start(%p), dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  %c = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
"""
    assert program_costs.count_collectives(text) == {
        "all-gather": {"count": 1, "bytes": 64},
        "collective-permute": {"count": 1, "bytes": 16},
    }


def test_collectives_that_the_compiler_for_tpus_writes_otherwise_count_once():
    """A reduce-scatter is an all-reduce and a slice; an overlapped all-gather occurs with one channel."""
    text = """
%all-reduce-scatter.1 (input: bf16[8,64], input.1: f32[16]) -> (bf16[1,64], f32[2]) {
  %all-reduce.1 = (bf16[8,64]{1,0}, f32[16]{0}) all-reduce(%input, %input.1), channel_id=3, to_apply=%add
  %dynamic-slice.1 = bf16[1,64]{1,0} dynamic-slice(%get, %c), dynamic_slice_sizes={1,64}
}

%fused_computation.1 (p: bf16[2]) -> bf16[16] {
  %all-gather.1 = bf16[16]{0} all-gather(%p), channel_id=4, dimensions={0}
}

%fused_computation.2 (p: bf16[2]) -> bf16[16] {
  %all-gather.2 = bf16[16]{0} all-gather(%p), channel_id=4, dimensions={0}
  %all-reduce.2 = f32[3]{0} all-reduce(%q), channel_id=5, to_apply=%add
}
"""
    assert program_costs.count_collectives(text) == {
        "reduce-scatter": {"count": 1, "bytes": 2 * 64 + 4 * 2},
        "all-gather": {"count": 1, "bytes": 32},
        "all-reduce": {"count": 1, "bytes": 12},
    }


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    text = """
%body (arg: f32[4]) -> f32[4] {
  %all-reduce.1 = f32[4]{0} all-reduce(%arg), channel_id=1, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.1 = f32[4]{0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce.2 = f32[2]{0} all-reduce(%q), channel_id=2, to_apply=%add
}
"""
    assert program_costs.count_collectives(text) == {"all-reduce": {"count": 4, "bytes": 3 * 16 + 8}}


@pytest.mark.parametrize(("count", "shape"), [("", "1x1x1"), (":8", "1x1x8")])
def test_a_file_describes_gpus(count, shape, monkeypatch):
    """What JAX's CUDA plugin, which is not installed here, would be asked for."""
    asked = lambda **arguments: types.SimpleNamespace(devices=arguments)
    monkeypatch.setattr(topologies, "get_topology_desc", asked)
    found = program_costs.topology_devices(f"{H100}{count}")
    assert (found["platform"], found["topology"], found["target_config"]) == ("cuda", shape, H100.read_text())
    assert "cuda_compute_capability" in H100.read_text()
