"""DeiT and DeiT III in PyTorch, for inference: patches, class token and, optionally, distillation token."""

import torch
from torch import nn

from torch_models.layers import Block, prepend


class Patches(nn.Module):
    """Non-overlapping patches of 16 pixels."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 16, stride=16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class DeiT(nn.Module):
    """[B, 3, H, W] -> logits [B, L]; the mean of the two heads if distilled."""

    def __init__(
        self, *, width: int, depth: int, heads: int, grid: tuple[int, int], classes: int, distilled: bool
    ):
        super().__init__()
        self.patch_embed = Patches(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        count = (2 if distilled else 1) + grid[0] * grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, count, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, 4 * width, eps=1e-6, qkv_bias=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        if distilled:
            self.head_dist = nn.Linear(width, classes)
        self.distilled = distilled

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        x = prepend(tokens, self.patch_embed(images)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.distilled:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(x[:, 0])


class LayerScaleBlock(Block):
    """A block whose residual branches are multiplied by a factor for each channel."""

    def __init__(self, width: int, heads: int, hidden: int, **options):
        super().__init__(width, heads, hidden, **options)
        self.gamma_1 = nn.Parameter(torch.zeros(width))
        self.gamma_2 = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class DeiT3(nn.Module):
    """[B, 3, H, W] -> logits [B, L]. The class token has no position."""

    def __init__(self, *, width: int, depth: int, heads: int, grid: tuple[int, int], classes: int):
        super().__init__()
        self.patch_embed = Patches(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], width))
        self.blocks = nn.ModuleList(
            LayerScaleBlock(width, heads, 4 * width, eps=1e-6, qkv_bias=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = prepend([self.cls_token], self.patch_embed(images) + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
