"""The training step of token labeling in PyTorch: targets from score maps, MixToken, loss, AdamW, average."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from torch_models.layers import prepend
from torch_models.lvvit import LVViT

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NO_DECAY = ("pos_embed", "cls_token")


def sampling_weights(
    geometry: torch.Tensor, cells: tuple[int, int], grid: tuple[int, int]
) -> torch.Tensor:  # fmt: skip
    """The weight of each cell of a map in the value of each token, as RoIAlign has it.

    Args:
      geometry: [B, 2, 3], augmented image -> map, both in [0, 1].
      cells: (hm, wm) of the map.
      grid: (h, w) of the tokens.

    Returns:
      float32 [B, h * w, hm * wm].
    """
    size = geometry.new_tensor([cells[1], cells[0]])
    corner = geometry[:, :, 2] * size - 0.5
    right = (geometry[:, :, 0] + geometry[:, :, 2]) * size - 0.5 - corner
    down = (geometry[:, :, 1] + geometry[:, :, 2]) * size - 0.5 - corner
    along_x, weight_x = samples(right, grid[1], max(cells))  # [B, w, gx, 2], [B, gx]
    along_y, weight_y = samples(down, grid[0], max(cells))
    position = corner[:, None, None, None, None] + along_y[:, :, :, None, None] + along_x[:, None, None]
    columns = bilinear(position[..., 0], cells[1])  # [B, h, gy, w, gx, wm]
    rows = bilinear(position[..., 1], cells[0]) * weight_y[:, None, :, None, None, None]
    rows = rows * weight_x[:, None, None, None, :, None]
    return torch.einsum("bygxfr,bygxfc->byxrc", rows, columns).flatten(3).flatten(1, 2)


def samples(side: torch.Tensor, tokens: int, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples along a side [B, 2] of a box, in cells: positions [B, tokens, G, 2] and weights [B, G].

    A token averages ceil(length / tokens) samples; G is that number for a side of `limit` cells.
    """
    length = side.norm(dim=1)
    most = math.ceil(limit / tokens)
    count = (length.clamp(min=1.0) / tokens).ceil().clamp(1, most)[:, None]
    index = torch.arange(most, device=side.device, dtype=side.dtype)
    one_token = side * (length.clamp(min=1.0) / length.clamp(min=1e-6) / tokens)[:, None]
    number = torch.arange(tokens, device=side.device, dtype=side.dtype)
    place = number[None, :, None] + (index[None, None, :] + 0.5) / count[:, None, :]
    weight = torch.where(index[None] < count, 1.0 / count, torch.zeros_like(count))
    return place[..., None] * one_token[:, None, None, :], weight


def bilinear(position: torch.Tensor, cells: int) -> torch.Tensor:
    """Weights [..., cells] of a position in cells; zero further than one cell outside."""
    near = (position >= -1.0) & (position <= cells)
    center = torch.arange(cells, device=position.device, dtype=position.dtype)
    distance = (position.clamp(0.0, cells - 1.0)[..., None] - center).abs()
    return (1.0 - distance).clamp(min=0.0) * near[..., None]


def make_targets(
    value: torch.Tensor,
    index: torch.Tensor,
    label: torch.Tensor,
    geometry: torch.Tensor,
    *,
    grid: tuple[int, int],
    classes: int,
    smoothing: float = 0.1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Targets of the class token [B, L] and of the tokens [B, N, L], and the tokens' weights [B, N].

    Args:
      value, index: [B, K, hm, wm], logits and classes of score maps.
      label: [B].
      geometry: [B, 2, 3], augmented image -> map.
      grid: (h, w), N = h * w.
      classes: L.
      smoothing: s; p * (1 - s + s / L) + s / L.
    """
    cells = tuple(value.shape[2:])
    dense = value.new_zeros(len(value), classes, cells[0] * cells[1], dtype=torch.float32)
    dense.scatter_add_(1, index.flatten(2).long(), value.flatten(2).float())

    def sample(token_grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        weights = sampling_weights(geometry, cells, token_grid)
        covered = weights.sum(-1)
        covered = torch.where(covered > 1 - 1e-4, torch.ones_like(covered), covered)
        weights = weights / torch.where(covered > 0, covered, torch.ones_like(covered))[..., None]
        probability = (weights @ dense.transpose(1, 2)).softmax(-1)
        return probability * (1 - smoothing + smoothing / classes) + smoothing / classes, covered

    tokens, weight = sample(grid)
    cls, covered = sample((1, 1))
    one_hot = functional.one_hot(label.long(), classes) * (1 - smoothing) + smoothing / classes
    return torch.where(covered > 0, cls[:, 0], one_hot), tokens, weight


def draw_mask(rng: np.random.Generator, grid: tuple[int, int]) -> np.ndarray:
    """MixToken's box, bool [h, w]: True where a token comes from the partner image."""
    side = math.sqrt(1 - rng.uniform())
    half = [int(n * side) // 2 for n in grid]
    middle = [rng.integers(n) for n in grid]
    mask = np.zeros(grid, bool)
    y, x = (slice(max(m - h, 0), m + h) for m, h in zip(middle, half, strict=True))
    mask[y, x] = True
    return mask


class TokenLabelLoss(nn.Module):
    """LV-ViT with its training loss; the images of a batch are mixed in reverse order."""

    def __init__(self, model: LVViT, grid: tuple[int, int], classes: int):
        super().__init__()
        self.model, self.grid, self.classes = model, grid, classes
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, batch: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of uint8 images [B, 3, H, W], score maps and a mask bool [h, w]."""
        with torch.no_grad():
            where = (batch[name] for name in ("value", "index", "label", "geometry"))
            cls_target, targets, weight = make_targets(*where, grid=self.grid, classes=self.classes)
            kept = 1 - mask.float().mean()
            cls_target = kept * cls_target + (1 - kept) * cls_target.flip(0)
            images = (batch["image"] / 255 - self.mean) / self.std
        cls, tokens = self.logits(images, mask)
        loss_cls = -(cls_target * cls.float().log_softmax(-1)).sum(-1).mean()
        losses = -(targets * tokens.float().log_softmax(-1)).sum(-1)
        return loss_cls + (weight * losses).mean()

    def logits(self, images: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the class token [B, L] and of the tokens [B, N, L], these in the images' own order."""
        model = self.model
        x = model.patch_embed(images)
        x = torch.where(mask, x.flip(0), x).flatten(2).transpose(1, 2)
        x = prepend([model.cls_token], x) + model.pos_embed
        for block in model.blocks:
            x = block(x)
        x = model.norm(x)
        tokens = model.aux_head(x[:, 1:])
        return model.head(x[:, 0]), torch.where(mask.flatten()[:, None], tokens.flip(0), tokens)


def make_step(
    loss: TokenLabelLoss, *, dtype: torch.dtype, compiled: bool, learning_rate: float = 1e-4
) -> Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]:
    """Builds (batch, mask) -> loss, which updates the model of `loss` with AdamW, and a moving average.

    Args:
      loss: the model on its device, in float32.
      dtype: of the products, by autocast; parameters and loss are float32.
      compiled: use torch.compile.
      learning_rate: of AdamW, with a weight decay of 0.05 on all but vectors and embeddings.
    """
    named = list(loss.model.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or name in NO_DECAY]
    decayed = [p for name, p in named if not (p.ndim < 2 or name in NO_DECAY)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    state = [value for value in loss.model.state_dict().values() if value.dtype.is_floating_point]
    average = copy.deepcopy(state)
    run = torch.compile(loss) if compiled else loss
    kind = named[0][1].device.type

    def step(batch: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
            value = run(batch, mask)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        torch._foreach_lerp_(average, state, 1 - 0.99992)
        return value.detach()

    return step
