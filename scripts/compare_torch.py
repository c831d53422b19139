"""Times the training step of tlvit against the same step in PyTorch; the last line printed is JSON.

    python -m scripts.compare_torch --device=cpu --cores=2 --model=lvvit_t,lvvit_s --batch-size=16
    python -m scripts.compare_torch --device=cuda --model=lvvit_s,lvvit_m --batch-size=64,128,256,512

Both steps make targets from score maps, apply MixToken, run forward and backward passes and AdamW, and update
the moving average, from the same uint8 images. PyTorch runs the model of tests/torch_models with fused AdamW,
a channels-last stem, bfloat16 by autocast where tlvit has bfloat16, and torch.compile where a compiler is
installed. Each side has a process of its own. Both may use the same cores, and they are timed in turns: one
waits while the other works. TensorFlow is not needed.

`ratio` compares the time of a step, `processor_ratio` the processor time of all threads of a side. On a CPU
with other load, `processor_ratio` with --cores=1 is the fairer one: with more cores, threads of PyTorch that
wait for each other use processor time too.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIDES = ("tlvit", "torch")
MODELS = ("lvvit_t", "lvvit_s", "lvvit_m")
CLASSES = 1000
Step = Callable[[], float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # the processes inherit it
    if options.side:
        return work(options)
    results = [compare(options, m, b) for m in options.model for b in options.batch_size]
    print(json.dumps({"device": options.device, "cores": len(os.sched_getaffinity(0)), "results": results}))
    return 0


def compare(options: argparse.Namespace, model: str, batch_size: int) -> dict[str, Any]:
    """Times both sides for one model and batch size, in turns, and prints a line."""
    workers: dict[str, subprocess.Popen] = {}
    reports: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    processor: dict[str, list[float]] = {side: [] for side in SIDES}
    try:
        for side in SIDES:  # one after the other: compiling uses all cores
            workers[side] = start(options, side, model, batch_size)
            reports[side] = ask(workers[side])
        for _ in range(options.rounds):
            for side in SIDES:
                times = ask(workers[side], "time")
                seconds[side] += times["seconds"]
                processor[side] += times["processor_seconds"]
        for side in SIDES:
            reports[side] |= ask(workers[side], "end")
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    result: dict[str, Any] = {"model": model, "batch": batch_size, "dtype": options.dtype}
    result["torch_compiled"] = reports["torch"]["compiled"]
    for side in SIDES:
        step_s = statistics.median(seconds[side])
        rate, flops = batch_size / step_s, reports["tlvit"]["flops_per_image"]
        peak = reports["tlvit"]["peak_flops"]
        result[side] = {
            "images_per_s": rate,
            "step_s": step_s,
            "processor_s": statistics.median(processor[side]),
            "mfu": rate * flops / peak if peak else None,
            "peak_memory_bytes": reports[side]["peak_memory_bytes"],
            "loss": reports[side]["loss"],
        }
    result["ratio"] = result["torch"]["step_s"] / result["tlvit"]["step_s"]
    result["processor_ratio"] = result["torch"]["processor_s"] / result["tlvit"]["processor_s"]
    print(describe(result), flush=True)
    return result


def describe(result: dict[str, Any]) -> str:
    """One line of text about a result."""
    ours, theirs = result["tlvit"], result["torch"]
    text = (
        f"{result['model']}  batch {result['batch']}  tlvit {ours['images_per_s']:.2f}  PyTorch "
        f"{theirs['images_per_s']:.2f} images/s  ratio {result['ratio']:.2f} (processor "
        f"time {result['processor_ratio']:.2f})  memory "
        f"{ours['peak_memory_bytes'] / 1e9:.1f} and {theirs['peak_memory_bytes'] / 1e9:.1f} GB"
    )
    return f"{text}  MFU {ours['mfu']:.0%} and {theirs['mfu']:.0%}" if ours["mfu"] else text


def start(options: argparse.Namespace, side: str, model: str, batch_size: int) -> subprocess.Popen:
    """Starts the process of one side."""
    environment = dict(os.environ)
    if options.device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other side needs memory too
    flags = {
        "side": side, "model": model, "batch-size": batch_size, "device": options.device,
        "steps": options.steps, "dtype": options.dtype, "image-size": options.image_size,
        "depth": options.depth, "torch-compile": options.torch_compile,
    }  # fmt: skip
    command = [sys.executable, "-m", "scripts.compare_torch", *(f"--{k}={v}" for k, v in flags.items())]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(worker: subprocess.Popen, request: str = "") -> dict[str, Any]:
    """Sends a request to a process and returns its answer, or its first message if there is no request."""
    if worker.stdin is None or worker.stdout is None:
        raise ValueError("The process has no pipes.")
    if request:
        worker.stdin.write(f"{request}\n")
        worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"The process of one side ended with status {worker.wait()}; its message is above.")


def work(options: argparse.Namespace) -> int:
    """The process of one side: compiles its step, then times it whenever it is asked to."""
    step, report = {"tlvit": tlvit_step, "torch": torch_step}[options.side](options)
    begin = time.perf_counter()
    for _ in range(3):
        loss = step()
    print(json.dumps({**report, "loss": loss, "first_steps_s": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        seconds, processor = [], []
        for _ in range(options.steps):
            begin, processor_begin = time.perf_counter(), time.process_time()
            loss = step()
            seconds.append(time.perf_counter() - begin)
            processor.append(time.process_time() - processor_begin)
        print(json.dumps({"seconds": seconds, "processor_seconds": processor}), flush=True)
    print(json.dumps({"loss": loss, "peak_memory_bytes": peak_memory(options)}), flush=True)
    return 0


def tlvit_step(options: argparse.Namespace) -> tuple[Step, dict[str, Any]]:
    """A function that runs one step of tlvit and waits for its loss, and facts about it."""
    import jax

    from scripts import benchmark_step, program_costs
    from tlvit import create_model
    from tlvit.host_memory import keep_freed_memory
    from tlvit.models.macs import model_macs
    from tlvit.training.mesh import make_mesh
    from tlvit.training.prefetch import to_global
    from tlvit.training.state import abstract_model

    keep_freed_memory(options.batch_size[0], (options.image_size, options.image_size))  # as training does
    if options.device == "cuda" and jax.default_backend() != "gpu":
        raise ValueError(f"--device=cuda, but JAX has no GPU here: its backend is {jax.default_backend()}.")
    mesh = make_mesh(jax.devices()[:1])
    settings = benchmark_options(options)
    train_step, state, batch = benchmark_step.build(settings, mesh)
    batch = to_global(batch, mesh)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        return float(metrics["loss"])

    config = benchmark_step.make_config(settings)
    sizes = {"num_classes": CLASSES, "image_size": config.image_size}
    make = lambda: create_model(config.model.name, **sizes, **config.model.options)
    macs = model_macs(*abstract_model(make), config.image_size)
    kind = jax.devices()[0].device_kind
    peak = next((v[0] for k, v in program_costs.CHIPS.items() if kind.startswith(k)), None)
    return step, {"device": kind, "flops_per_image": 6 * macs, "peak_flops": peak}


def torch_step(options: argparse.Namespace) -> tuple[Step, dict[str, Any]]:
    """The same for the model of tests/torch_models."""
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    import torch
    from torch_models.lvvit import LVViT
    from torch_models.token_labels import TokenLabelLoss, draw_mask, make_step

    from scripts import benchmark_step
    from tlvit.models.lvvit import VARIANTS

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but PyTorch has no GPU here.")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    variant, grid = VARIANTS[options.model[0]], (options.image_size // 16,) * 2
    model = LVViT(
        width=variant["dim"], depth=options.depth or variant["depth"], heads=variant["num_heads"],
        stem=variant["stem_width"], residual=variant["skip_lam"], grid=grid, classes=CLASSES,
    )  # fmt: skip
    torch.nn.init.trunc_normal_(model.pos_embed, std=0.02)
    model.patch_embed.to(memory_format=torch.channels_last)
    data = benchmark_step.make_batch(benchmark_options(options))
    if data.maps is None:
        raise ValueError("The batch has no score maps.")
    arrays = {
        "image": data.image.transpose(0, 3, 1, 2),  # channels last in memory
        "value": data.maps.value,
        "index": data.maps.index.astype(np.int64),
        "label": data.label,
        "geometry": data.geometry,
    }
    batch = {name: torch.from_numpy(array).to(options.device) for name, array in arrays.items()}
    dtype = getattr(torch, options.dtype)
    compiled = {"auto": has_compiler(options.device), "on": True, "off": False}[options.torch_compile]
    loss = TokenLabelLoss(model.to(options.device).train(), grid, CLASSES).to(options.device)
    update, rng = make_step(loss, dtype=dtype, compiled=compiled), np.random.default_rng(0)

    def step() -> float:
        mask = torch.from_numpy(draw_mask(rng, grid)).to(options.device, non_blocking=True)
        return float(update(batch, mask))

    return step, {"compiled": compiled}


def has_compiler(device: str) -> bool:
    """Whether torch.compile finds what it needs: Triton for a GPU, a C++ compiler for a CPU."""
    if device == "cuda":
        import importlib.util

        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def benchmark_options(options: argparse.Namespace) -> argparse.Namespace:
    """The options of `scripts.benchmark step` for the same step; drop path is off on both sides."""
    from scripts import benchmark_step

    flags = {
        "model": options.model[0], "batch-size": options.batch_size[0], "dtype": options.dtype,
        "drop-path": 0, "image-size": options.image_size, "num-classes": CLASSES, "depth": options.depth,
    }  # fmt: skip
    return benchmark_step.parse(["step", *(f"--{name}={value}" for name, value in flags.items())])


def peak_memory(options: argparse.Namespace) -> int:
    """Peak memory in bytes: of the GPU, or of this process."""
    if options.device == "cuda" and options.side == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    if options.device == "cuda":
        import jax

        return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    description, examples, more = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare_torch",
        description=description,
        epilog=f"examples:\n{examples}\n\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = lambda text: [check_model(name) for name in text.split(",")]
    add("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    add("--model", type=names, default=["lvvit_s"], metavar="NAMES",
        help=f"of {', '.join(MODELS)}; several with commas (default: lvvit_s)")  # fmt: skip
    add("--batch-size", type=lambda text: [int(n) for n in text.split(",")], default=[16], metavar="N,N",
        help="images in a step; several with commas (default: 16)")  # fmt: skip
    add("--dtype", default="", choices=["float32", "bfloat16"],
        help="of the products (default: bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip
    add("--cores", type=int, default=0, metavar="N", help="cores that both may use (default: all)")
    add("--steps", type=int, default=3, metavar="N", help="steps timed in one turn (default: 3)")
    add("--rounds", type=int, default=4, metavar="N", help="turns of each side (default: 4)")
    add("--image-size", type=int, default=224, metavar="N", help="height and width, pixels (default: 224)")
    add("--depth", type=int, default=0, metavar="N", help="number of blocks (default: the model's)")
    add("--torch-compile", default="auto", choices=["auto", "on", "off"],
        help="torch.compile; auto: if a compiler is installed")  # fmt: skip
    add("--side", choices=SIDES, help=argparse.SUPPRESS)  # of the two processes
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def check_model(name: str) -> str:
    """The name, if it is one of MODELS."""
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(MODELS)}")
    return name


if __name__ == "__main__":
    sys.exit(main())
