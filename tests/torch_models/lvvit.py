"""LV-ViT in PyTorch, for inference: convolutional stem, class token, token head."""

import torch
from torch import nn

from torch_models.layers import Block, prepend


class Stem(nn.Module):
    """Three convolutions at half resolution, then patches."""

    def __init__(self, width: int, hidden: int, patch: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, hidden, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(hidden)
        self.proj = nn.Conv2d(hidden, width, patch // 2, stride=patch // 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        return self.proj(x)


class LVViT(nn.Module):
    """[B, 3, H, W] -> logits [B, L], class token plus half of the maximum over the tokens."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        stem: int,
        residual: float,
        grid: tuple[int, int],
        classes: int,
    ):
        super().__init__()
        self.patch_embed = Stem(width, stem, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        self.blocks = nn.ModuleList(
            Block(width, heads, 3 * width, eps=1e-5, residual=residual) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, classes)
        self.aux_head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = prepend([self.cls_token], self.patch_embed(images).flatten(2).transpose(1, 2)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0]) + 0.5 * self.aux_head(x[:, 1:]).amax(dim=1)
