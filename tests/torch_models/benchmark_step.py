"""Times the training step of LV-ViT in PyTorch, for comparison with `python -m scripts.benchmark step`.

    python tests/torch_models/benchmark_step.py lvvit_s --threads 2

A step consists of forward pass, token-label loss, backward pass, AdamW and moving average, in float32. The
targets are given, while tlvit's step samples them from score maps.
"""

import argparse
import copy
import json
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from torch_models.lvvit import LVViT

SIZES = {
    "lvvit_t": {"width": 240, "depth": 12, "heads": 4, "residual": 1.0},
    "lvvit_s": {"width": 384, "depth": 16, "heads": 6, "residual": 2.0},
}
TOKENS = (14, 14)
CLASSES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = LVViT(**SIZES[options.model], stem=64, grid=TOKENS, classes=CLASSES).train()
    average = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    images = torch.randn(options.batch, 3, 224, 224)
    targets = torch.softmax(3 * torch.randn(options.batch, 1 + TOKENS[0] * TOKENS[1], CLASSES), -1)
    encoded = []
    model.norm.register_forward_hook(lambda module, inputs, output: encoded.append(output))
    seconds = []
    for _ in range(2 + options.steps):
        start = time.perf_counter()
        model(images)
        tokens = encoded.pop()
        cls = torch.log_softmax(model.head(tokens[:, 0]), -1)
        patches = torch.log_softmax(model.aux_head(tokens[:, 1:]), -1)
        loss = -(targets[:, 0] * cls).sum(-1).mean() - (targets[:, 1:] * patches).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.dtype.is_floating_point:
                    average[name].mul_(0.99992).add_(value, alpha=1 - 0.99992)
        seconds.append(time.perf_counter() - start)
    step_s = statistics.median(seconds[2:])
    print(json.dumps({"model": options.model, "images_per_s": options.batch / step_s, "step_s": step_s}))


if __name__ == "__main__":
    main()
