"""Measures the parts of a run; the last line printed is JSON.

    python -m scripts.benchmark step --model=lvvit_s --batch-size=16        # images/s of the training step
    python -m scripts.benchmark step --attention=fused,xla                  # which attention is faster here
    python -m scripts.benchmark compile --model=lvvit_s --batch-size=128    # FLOPs, bytes and collectives
    python -m scripts.benchmark compile --topology=v5e:2x4                  # the same for absent TPUs
    python -m scripts.benchmark compile --topology=v5e:2x4 --mesh=data=2,fsdp=4
    python -m scripts.benchmark compile --annotator=dm_nfnet_f6             # with an annotator in the step
    python -m scripts.benchmark attention --help                            # memory traffic of attention
    python -m scripts.benchmark inference --model=lvvit_s                   # images/s, latency and memory
    python -m scripts.benchmark annotate --help                             # images/s of annotation
    python -m scripts.benchmark input --help                                # images/s of the data pipeline
    python -m scripts.benchmark resume --help                               # resume in the middle of an epoch

`step --help` lists the options of step and compile.
"""

import importlib
import sys
from collections.abc import Sequence

PROGRAMS = {
    "step": "scripts.benchmark_step",
    "compile": "scripts.benchmark_step",
    "attention": "scripts.benchmark_attention",
    "inference": "scripts.benchmark_inference",
    "annotate": "scripts.benchmark_annotate",
    "input": "scripts.benchmark_input",
    "resume": "scripts.benchmark_resume",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not arguments or arguments[0] not in PROGRAMS:
        print(f"error: name what to measure: {', '.join(PROGRAMS)} (--help shows examples)", file=sys.stderr)
        return 2
    program = importlib.import_module(PROGRAMS[arguments[0]])
    both = arguments[0] in ("step", "compile")  # two uses of one program, which reads the word itself
    return program.main(arguments if both else arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
