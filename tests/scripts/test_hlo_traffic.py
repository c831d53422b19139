"""Bytes in HBM, counted from the text of small programs."""

import jax
import jax.numpy as jnp
import pytest

from scripts.hlo_traffic import hbm_traffic, loop_counts

PROGRAM = """HloModule jit_step, is_scheduled=true

FunctionNames
1 "main"
2 "attention"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=0 end_column=0}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=0 end_column=0}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused (param_0: f32[10,100], param_1: f32[100]) -> f32[100] {
  %param_0 = f32[10,100]{1,0:T(8,128)} parameter(0)
  %slice.1 = f32[1,100]{1,0:T(8,128)} slice(%param_0), slice={[0:1], [0:100]}
  %param_1 = f32[100]{0:T(128)S(1)} parameter(1)
  ROOT %add.1 = f32[100]{0:T(128)} add(%slice.1, %param_1)
}

%body (arg: (f32[100])) -> (f32[100]) {
  %arg = (f32[100]{0:T(128)}) parameter(0)
  %item = f32[100]{0:T(128)} get-tuple-element(%arg), index=0
  %negate.1 = f32[100]{0:T(128)} negate(%item), metadata={op_name="jit(step)/transpose(jvp())/neg" stack_frame_id=2}
  ROOT %result = (f32[100]{0:T(128)}) tuple(%negate.1)
}

%condition (arg.1: (f32[100])) -> pred[] {
  %arg.1 = (f32[100]{0:T(128)}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p: f32[10,100], q: f32[100]) -> f32[100] {
  %p = f32[10,100]{1,0:T(8,128)} parameter(0), metadata={op_name="state.params['x']"}
  %q = f32[100]{0:T(128)} parameter(1), metadata={op_name="batch.image"}
  %copy-start.1 = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%q)
  %copy-done.1 = f32[100]{0:T(128)S(1)} copy-done(%copy-start.1)
  %fusion.1 = f32[100]{0:T(128)} fusion(%p, %copy-done.1), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/add" stack_frame_id=2}
  %start = (f32[100]{0:T(128)}) tuple(%fusion.1)
  %while.1 = (f32[100]{0:T(128)}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[100]{0:T(128)} get-tuple-element(%while.1), index=0
}
"""  # noqa: E501


def test_slices_copies_and_loops_are_counted_by_hand():
    array = 400  # bytes of f32[100]
    assert hbm_traffic(PROGRAM) == {
        "copy of batch (an argument)": array,  # the other side of the copy is not in HBM
        "attention": array + array,  # a slice of p is read, the result written; the copy of q is not in HBM
        "attention, backward": 3 * (array + array),
    }


LOOP = """HloModule jit_step, is_scheduled=true

%inner (param_0.1: f32[5,100], param_1.1: s32[]) -> f32[100] {
  %param_0.1 = f32[5,100]{1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %bitcast.1 = f32[5,1,100]{2,1,0:T(8,128)} bitcast(%param_0.1)
  %zero = s32[]{:T(128)} constant(0)
  %dynamic-slice.1 = f32[1,1,100]{2,1,0:T(8,128)} dynamic-slice(%bitcast.1, %param_1.1, %zero, %zero)
  ROOT %bitcast.2 = f32[100]{0:T(128)} bitcast(%dynamic-slice.1)
}

%fused (param_0: f32[5,100], param_1: f32[5,100], param_2: s32[]) -> (f32[5,100], f32[100]) {
  %param_0 = f32[5,100]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[5,100]{1,0:T(8,128)} parameter(1)
  %param_2 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  %fusion.1 = f32[100]{0:T(128)} fusion(%param_0, %param_2), kind=kLoop, calls=%inner
  %bitcast.3 = f32[1,100]{1,0:T(8,128)} bitcast(%fusion.1)
  %update = f32[5,100]{1,0:T(8,128)} dynamic-update-slice(%param_1, %bitcast.3, %param_2, %zero.1)
  ROOT %both = (f32[5,100]{1,0:T(8,128)}, f32[100]{0:T(128)}) tuple(%update, %fusion.1)
}

%body (arg: (s32[], f32[5,100], f32[5,100])) -> (s32[], f32[5,100], f32[5,100]) {
  %arg = (s32[]{:T(128)}, f32[5,100]{1,0:T(8,128)}, f32[5,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %in = f32[5,100]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %out = f32[5,100]{1,0:T(8,128)} get-tuple-element(%arg), index=2
  %fusion.2 = (f32[5,100]{1,0:T(8,128)}, f32[100]{0:T(128)S(1)}) fusion(%in, %out, %i), kind=kLoop, calls=%fused, metadata={op_name="copy"}
  %new = f32[5,100]{1,0:T(8,128)} get-tuple-element(%fusion.2), index=0
  ROOT %result = (s32[]{:T(128)}, f32[5,100]{1,0:T(8,128)}, f32[5,100]{1,0:T(8,128)}) tuple(%i, %in, %new)
}

%condition (arg.1: (s32[], f32[5,100], f32[5,100])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[5,100]{1,0:T(8,128)}, f32[5,100]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: f32[5,100], start: s32[]) -> f32[5,100] {
  %p = f32[5,100]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)S(6)} parameter(1)
  %buffer = f32[5,100]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %first = (s32[]{:T(128)}, f32[5,100]{1,0:T(8,128)}, f32[5,100]{1,0:T(8,128)}) tuple(%start, %p, %buffer)
  %while.1 = (s32[]{:T(128)}, f32[5,100]{1,0:T(8,128)}, f32[5,100]{1,0:T(8,128)}) while(%first), condition=%condition, body=%body
  ROOT %done = f32[5,100]{1,0:T(8,128)} get-tuple-element(%while.1), index=2
}
"""  # noqa: E501


def test_a_loop_moves_the_slices_that_it_reads_and_updates():
    """Stacked arrays are sliced and updated in place, inside of nested fusions; the trip count is that of
    the condition."""
    assert hbm_traffic(LOOP) == {"copy": 5 * (400 + 400)}  # the second result is not in HBM
    counts = loop_counts(LOOP)
    assert (counts["main"], counts["body"], counts["fused"], counts["inner"]) == (1, 5, 5, 5)


def test_the_memory_of_one_product_is_that_of_its_operands_and_result():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 32))]
    text = jax.jit(jnp.dot).lower(*shapes).compile().as_text()
    assert sum(hbm_traffic(text).values()) == 4 * (64 * 128 + 128 * 32 + 64 * 32)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hbm_traffic("hello")
