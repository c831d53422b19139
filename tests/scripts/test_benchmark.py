"""The last line of the benchmark is the documented JSON, with the figures of the compiled program."""

import functools
import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

import tlvit
from scripts import benchmark, benchmark_step, program_costs
from tlvit.models.functional import count_parameters
from tlvit.training import mesh as sharding
from tlvit.training.state import abstract_model

TINY = {"patch_size": 8, "dim": 32, "depth": 1, "num_heads": 2, "stem_width": 8}
ARGUMENTS = [
    "--model=lvvit_s",
    "--batch-size=16",
    "--image-size=32",
    "--num-classes=10",
    "--map-size=6",
    "--drop-path=0",
]
COMMON = {"model", "batch", "dtype", "attention", "device", "mesh", "compile_s"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Replaces the named model by a smaller one."""
    monkeypatch.setattr(benchmark_step, "create_model", functools.partial(tlvit.create_model, **TINY))


def run(capsys, *arguments):
    """The last line printed, read as JSON."""
    assert benchmark.main([*arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def count_tiny():
    make = lambda: tlvit.create_model("lvvit_s", num_classes=10, image_size=32, **TINY)
    return count_parameters(abstract_model(make)[1])


@pytest.mark.slow
def test_step(capsys):
    found = run(capsys, "step", *ARGUMENTS, "--steps=4")
    keys = {"images_per_s", "step_s", "step_s_quartiles", "host_step_s", "peak_memory_bytes"}
    assert found.keys() == COMMON | keys
    assert found["device"] == "8 x cpu"
    assert found["images_per_s"] == pytest.approx(16 / found["step_s"])
    assert 0 < found["step_s_quartiles"][0] <= found["step_s"] <= found["step_s_quartiles"][1]
    assert found["host_step_s"] >= 0
    assert found["compile_s"] > 0
    assert found["peak_memory_bytes"] > 1 << 20


@pytest.fixture(scope="module")
def compiled():
    """What `compile` finds for one and for eight devices, 16 images each time."""
    options = benchmark_step.parse(["compile", *ARGUMENTS])
    before = benchmark_step.create_model
    benchmark_step.create_model = functools.partial(tlvit.create_model, **TINY)
    found = {
        n: benchmark_step.inspect_program(options, sharding.make_mesh(jax.devices()[:n])) for n in (1, 8)
    }
    benchmark_step.create_model = before
    return found


def test_compile_prints_the_documented_keys(capsys):
    found = run(capsys, "compile", *ARGUMENTS, "--dtype=bfloat16")
    keys = {"flops_per_image", "bytes_per_image", "hbm_bytes_per_image", "hbm_largest", "state_bytes",
            "argument_bytes", "temp_bytes", "collectives", "roofline", "compile_cpu_s"}  # fmt: skip
    assert found.keys() == COMMON | keys
    assert (found["model"], found["batch"], found["dtype"]) == ("lvvit_s", 16, "bfloat16")
    assert found["roofline"] is None  # no data sheet for this machine
    assert len(found["hbm_largest"]) == 10
    assert 0 < sum(found["hbm_largest"].values()) < found["hbm_bytes_per_image"]


@pytest.mark.slow
def test_eight_devices_exchange_gradients_and_nothing_else(compiled):
    """One all-reduce of every parameter's gradient (and of the little that BatchNorm and the loss need)."""
    parameter_bytes = 4 * count_tiny()
    assert compiled[1]["collectives"] == {}
    collectives = compiled[8]["collectives"]
    assert collectives.keys() == {"all-reduce"}
    assert parameter_bytes <= collectives["all-reduce"]["bytes"] < 1.05 * parameter_bytes


@pytest.mark.slow
def test_figures_per_image_and_chip(compiled):
    """The work on an image does not depend on the number of devices; the batch is split, the state is not."""
    one, eight = compiled[1], compiled[8]
    assert eight["flops_per_image"] == pytest.approx(one["flops_per_image"], rel=0.35)
    image_bytes = 16 * (32 * 32 * 3 + 4 + 1 + 5 * 36 * (2 + 2) + 6 * 4)
    assert one["argument_bytes"] - eight["argument_bytes"] == pytest.approx(image_bytes * 7 / 8, rel=0.01)
    state_bytes = 4 * 4 * count_tiny()  # parameters, two moments, their average
    assert one["argument_bytes"] == pytest.approx(state_bytes + image_bytes, rel=0.01)
    # Forward and backward of the matrix products: 6 operations a weight and token; 16 tokens, 10 D^2 weights.
    assert one["flops_per_image"] > 6 * 16 * 10 * 32**2 * 0.8


@pytest.mark.slow
def test_the_figures_of_a_loop_are_those_of_all_its_blocks():
    options = [
        benchmark_step.parse(["compile", *ARGUMENTS, "--depth=4", *more]) for more in ([], ["--scan-blocks"])
    ]
    mesh = sharding.make_mesh(jax.devices()[:1])
    plain, loop = (benchmark_step.inspect_program(each, mesh) for each in options)
    assert loop["flops_per_image"] == pytest.approx(plain["flops_per_image"], rel=0.25)
    assert loop["bytes_per_image"] is None
    assert loop["hbm_bytes_per_image"] == pytest.approx(plain["hbm_bytes_per_image"], rel=0.5)


def test_products_that_nothing_uses_do_not_count():
    """The gradient of a product has two products; its own value is traced, but not used."""

    def gradient(x, w, grad):
        return jax.vjp(jax.jit(lambda x, w: x @ w), x, w)[1](grad)

    x, w, grad = np.ones((4, 5), np.float32), np.ones((5, 6), np.float32), np.ones((4, 6), np.float32)
    assert program_costs.product_flops(gradient, x, w, grad) == 2 * 2 * 4 * 5 * 6


def test_the_shapes_of_a_batch_are_those_of_its_arrays():
    options = benchmark_step.parse(["compile", *ARGUMENTS])
    found = benchmark_step.abstract_batch(options, sharding.batch_sharding(sharding.make_mesh()))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(found) == shapes(benchmark_step.make_batch(options))


@pytest.mark.slow
def test_accumulation_and_rematerialization_save_memory():
    """Parts of a batch need about their share of the temporaries, and the same products as the batch."""
    more = {"plain": [], "parts": ["--accumulate=4"], "remat": ["--remat", "--scan-blocks"]}
    common = ["compile", *ARGUMENTS, "--batch-size=64", "--image-size=64", "--depth=4"]
    mesh = sharding.make_mesh(jax.devices()[:1])
    options = {name: benchmark_step.parse([*common, *flags]) for name, flags in more.items()}
    found = {name: benchmark_step.inspect_program(each, mesh) for name, each in options.items()}
    memory = {name: each["temp_bytes"] for name, each in found.items()}
    assert len({each["argument_bytes"] for each in found.values()}) == 1
    assert memory["parts"] < 0.4 * memory["plain"]
    assert memory["remat"] < 0.8 * memory["plain"]
    products = {
        name: program_costs.product_flops(*benchmark_step.build(each, mesh, abstract=True))
        for name, each in options.items()
    }
    assert products["parts"] == products["plain"]
    # Forward and backward pass are three products each; a second forward pass adds at most a third.
    assert 1.1 < products["remat"] / products["plain"] < 4 / 3


@pytest.mark.slow
def test_a_mesh_divides_the_state(compiled):
    options = benchmark_step.parse(["compile", *ARGUMENTS])
    mesh = sharding.make_mesh(**benchmark_step.parse_mesh("data=1,fsdp=8"))
    found = benchmark_step.inspect_program(options, mesh)
    assert found["mesh"] == "data 1 x fsdp 8"
    assert found["state_bytes"] < 0.3 * compiled[8]["state_bytes"]
    assert found["argument_bytes"] < 0.5 * compiled[8]["argument_bytes"]
    assert found["flops_per_image"] == pytest.approx(compiled[8]["flops_per_image"], rel=0.1)
    kernels = 4 * 32 * (3 + 1 + 3 + 3) * 32  # bytes of a block's kernels, which are gathered once
    assert kernels < found["collectives"]["all-gather"]["bytes"] < 3 * kernels


def test_meshes_are_parsed():
    assert benchmark_step.parse_mesh("") == {}
    assert benchmark_step.parse_mesh("data=-1,model=2") == {"data": -1, "model": 2}
    for text in ("data", "rows=2", "fsdp=two"):
        with pytest.raises(ValueError, match="--mesh is a list such as data=2,fsdp=4,model=1, not"):
            benchmark_step.parse_mesh(text)


def test_the_batch_has_shapes_and_ranges_of_a_recipe():
    """Shapes, types and ranges of a recipe's batch: crops lie inside the image; classes are valid."""
    batch = benchmark_step.make_batch(benchmark_step.parse(["step", *ARGUMENTS]))
    assert (batch.image.shape, batch.image.dtype) == ((16, 32, 32, 3), np.uint8)
    assert (batch.maps.value.shape, batch.maps.value.dtype) == ((16, 5, 6, 6), np.float16)
    assert (batch.maps.index.shape, batch.maps.index.dtype) == ((16, 5, 6, 6), np.uint16)
    assert batch.maps.index.max() < 10
    assert (np.diff(batch.maps.index.astype(int), axis=1) == 1).all()
    low = batch.geometry[:, :, 2]
    high = low + batch.geometry[:, [0, 1], [0, 1]]
    assert low.min() >= 0
    assert high.max() <= 1


@pytest.mark.slow
def test_a_model_without_tokens_can_be_measured(monkeypatch):
    small = {"widths": (8,), "depths": (1,), "strides": (2,), "group_width": 8, "stem_width": 8}
    monkeypatch.setattr(benchmark_step, "create_model", functools.partial(tlvit.create_model, **small))
    options = benchmark_step.parse(["compile", *ARGUMENTS, "--model=regnety_002"])
    assert benchmark_step.inspect_program(options, sharding.make_mesh())["flops_per_image"] > 0


CONVNET = {"widths": (8,), "depths": (1,), "strides": (2,), "group_width": 8, "stem_width": 8}


@pytest.fixture
def small_annotator(monkeypatch):
    """Replaces regnety_002 by a smaller one."""
    build = lambda info, seed=0: tlvit.create_model(
        info.model, num_classes=info.num_classes, image_size=info.image_size, **CONVNET
    )
    monkeypatch.setattr("tlvit.checkpoints.model_info.ModelInfo.build", build)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["compile", "step"])
def test_the_price_of_an_annotator_inside_the_step(what, capsys, small_annotator):
    annotator = ["--annotator=regnety_002", "--annotator-image-size=48"]
    found = run(capsys, what, *ARGUMENTS, *annotator, "--steps=2")
    price = found["annotator"]
    assert (price["model"], price["image_size"]) == ("regnety_002", 48)
    if what == "compile":
        more = found["flops_per_image"] - price["without"]["flops_per_image"]
        assert price["added_flops_per_step"] == pytest.approx(16 * more)
        assert more > 2 * 24 * 24 * 27 * 8  # the stem alone
        assert price["added_hbm_bytes_per_step"] > 0
        # Score maps are not an argument; the annotator's parameters are.
        assert found["argument_bytes"] != price["without"]["argument_bytes"]
    else:
        assert price["without"]["step_s"] > 0


@pytest.mark.slow
def test_inference_is_measured(capsys):
    found = run(
        capsys, "inference", "--model=lvvit_t", "--depth=1", "--image-size=32", "--batch-size=4", "--steps=2"
    )
    assert (found["model"], found["image_size"], found["batch"]) == ("lvvit_t", 32, 4)
    assert found["images_per_s"] == pytest.approx(4 / found["batch_s"])
    assert found["latency_s_quartiles"][0] <= found["latency_s"] <= found["latency_s_quartiles"][1]
    assert found["peak_memory_bytes"] > 1e6


def test_annotation_is_measured(capsys, small_annotator):
    small = ["--model=regnety_002", "--image-size=32", "--batch-size=16", "--images=64"]
    found = run(capsys, "annotate", *small)
    assert (found["model"], found["batch"], found["images"]) == ("regnety_002", 16, 64)
    assert found["images_per_s"] > 0
    assert 0 <= found["device_wait"] < 1
    assert found["collectives"] == {}  # of eight devices
    assert found["flops_per_image"] > 2 * 16 * 16 * 27 * 8


@pytest.mark.slow
def test_annotation_is_compiled_for_a_topology(capsys, monkeypatch, small_annotator):
    """With this machine's CPUs in place of a TPU's chips."""
    from scripts import benchmark_annotate

    monkeypatch.setattr(benchmark_annotate, "topology_devices", lambda name: jax.devices())
    monkeypatch.setattr(program_costs, "CHIPS", {"cpu": (1e12, 1e11)})
    small = ["--model=regnety_002", "--image-size=32", "--topology=v5e:2x4", "--utilization=0.25"]
    monkeypatch.setattr(benchmark_annotate, "V5E_BYTES", 2**24)
    found = run(capsys, "annotate", *small)
    assert found["batch"] % 8 == 0
    assert found["needed_bytes"] <= 2**24
    slowest = max(found["roofline"]["compute_s"], found["roofline"]["memory_s"])
    hours = 1_281_167 / found["batch"] * slowest / 0.25 / 3600
    assert found["imagenet_hours"] == pytest.approx(hours)


@pytest.mark.slow
def test_attention_alone(capsys):
    arguments = ["attention", "--tokens=5", "--heads=2", "--head-width=8", "--images=2", "--kinds=xla,fused"]
    assert benchmark.main(arguments) == 0
    xla, fused = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(found["kind"], found["tokens"]) for found in (xla, fused)] == [("xla", 5), ("fused", 5)]
    # At least the input, the result and both gradients, in bfloat16: 3 + 1 + 1 + 3 times the width.
    assert all(found["hbm_bytes_per_image"] >= 8 * 16 * 5 * 2 for found in (xla, fused))
    with pytest.raises(SystemExit):
        benchmark.main(["attention", "--kinds=xla,flush"])
    assert "not flush" in capsys.readouterr().err


def test_no_tensorflow():
    """Neither TensorFlow nor TFDS, clu, ml_collections or torch is imported."""
    code = f"""
import functools, sys
import tlvit
from scripts import benchmark, benchmark_step, program_costs
benchmark_step.create_model = functools.partial(tlvit.create_model, **{TINY!r})
assert benchmark.main(["compile", *{ARGUMENTS!r}]) == 0
heavy = {{"tensorflow", "tensorflow_datasets", "clu", "ml_collections", "torch"}} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["device"] == "1 x cpu"


@pytest.mark.slow
def test_resume(capsys, monkeypatch, tmp_path):
    """Equal shards are hard links of one file; no file remains."""
    from scripts import benchmark_resume

    monkeypatch.setattr(benchmark_resume, "STARTS", (0.5,))
    sizes = ("--records=64", "--shards=8", "--files=2", "--bytes=80000", "--batch=8", "--shuffle-gib=0.02")
    found = run(capsys, "resume", f"--folder={tmp_path}", *sizes)
    assert (found["records"], found["shards"]) == (64, 8)
    assert found["record_bytes"] == pytest.approx(80_000, rel=0.01)
    assert [s["step"] for s in found["starts"]] == [4]
    assert 0 < found["first_batch_s"] == found["first_batch_s_at_most"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 3, 4, 100, 65_537, 65_540, 200_000])
def test_padded_jpegs_show_the_same_picture(size):
    import PIL.Image

    from scripts.benchmark_resume import pad_jpeg

    stream = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (200, 30, 90)).save(stream, "JPEG")
    padded = pad_jpeg(stream.getvalue(), len(stream.getvalue()) + size)
    assert 0 <= len(stream.getvalue()) + size - len(padded) < 4
    decode = lambda content: np.asarray(PIL.Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(decode(padded), decode(stream.getvalue()))
