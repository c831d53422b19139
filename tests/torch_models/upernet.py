"""UperNet over LV-ViT in PyTorch, built from `torch.nn` with the names of mmsegmentation."""

import torch
from torch import nn
from torch.nn import functional

from torch_models.layers import Block, prepend
from torch_models.lvvit import Stem


def resize(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(x, size=other.shape[2:], mode="bilinear", align_corners=False)


class ConvModule(nn.Module):
    def __init__(self, width_in: int, width_out: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).relu()


def side_layer(width: int, width_out: int, scale: int) -> nn.Sequential:
    finer = []
    if scale > 1:
        finer = [nn.ConvTranspose2d(width, width, scale, scale, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(
        *finer, nn.Conv2d(width, width_out, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()
    )


class Backbone(nn.Module):
    """[B, 3, H, W] -> feature maps after the given blocks."""

    def __init__(self, width, depth, heads, stem, residual, grid, blocks, scales):
        super().__init__()
        self.grid, self.out_blocks, self.levels = grid, blocks, list(scales)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        self.patch_embed = Stem(width, stem, 16)
        self.blocks = nn.ModuleList(
            Block(width, heads, 3 * width, eps=1e-6, residual=residual) for _ in range(depth)
        )
        for level, scale in scales.items():
            layer = side_layer(width, 2048 if level == 4 else width, scale)
            setattr(self, f"side_layer{level}", layer)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = self.patch_embed(images)
        h, w = x.shape[2:]
        table = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)
        table = functional.interpolate(table, size=(h, w), mode="bicubic", align_corners=False)
        positions = torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)
        x = prepend([self.cls_token], x.flatten(2).transpose(1, 2)) + positions
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x[:, 1:].transpose(1, 2).unflatten(2, (h, w)))
        return [getattr(self, f"side_layer{i}")(outputs[self.out_blocks[i - 1]]) for i in self.levels]


class UPerHead(nn.Module):
    def __init__(self, width: int, channels: int, classes: int):
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), ConvModule(2048, channels, 1)) for bins in (1, 2, 3, 6)
        )
        self.bottleneck = ConvModule(2048 + 4 * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * channels, channels, 3)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        last = features[3]
        pooled = [resize(module(last), last) for module in self.psp_modules]
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=False)]
        maps.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for i in (3, 2, 1):
            maps[i - 1] = maps[i - 1] + resize(maps[i], maps[i - 1])
        maps[:3] = [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=False)]
        fused = torch.cat([resize(x, maps[0]) for x in maps], dim=1)
        return self.conv_seg(self.fpn_bottleneck(fused))


class FCNHead(nn.Module):
    def __init__(self, width: int, channels: int, classes: int, convs: int, level: int):
        super().__init__()
        self.level = level
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.convs = nn.Sequential(*(ConvModule(channels if i else width, channels, 3) for i in range(convs)))
        if convs > 1:
            self.conv_cat = ConvModule(width + channels, channels, 3)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        x = self.convs(features[self.level])
        if hasattr(self, "conv_cat"):
            x = self.conv_cat(torch.cat([features[self.level], x], dim=1))
        return self.conv_seg(x)


class UperNet(nn.Module):
    """[B, 3, H, W] -> logits [B, h, w, L] of the decode head. `forward_all`: also of the auxiliary one."""

    def __init__(
        self, *, width: int, depth: int, heads: int, stem: int, residual: float, grid: tuple[int, int],
        classes: int, channels: int, blocks: tuple[int, ...], head: str = "upernet",
    ):  # fmt: skip
        super().__init__()
        scales = {1: 4, 2: 2, 3: 1, 4: 1} if head == "upernet" else {3: 1, 4: 1}
        self.backbone = Backbone(width, depth, heads, stem, residual, grid, blocks, scales)
        if head == "upernet":
            self.decode_head = UPerHead(width, channels, classes)
        else:
            self.decode_head = FCNHead(2048, channels, classes, convs=2, level=-1)
        self.auxiliary_head = FCNHead(width, channels, classes, convs=1, level=-2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_all(images)[0]

    def forward_all(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.backbone(images)
        outputs = self.decode_head(features), self.auxiliary_head(features)
        return outputs[0].permute(0, 2, 3, 1), outputs[1].permute(0, 2, 3, 1)
