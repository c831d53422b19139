"""T2T-ViT in PyTorch, for inference: three soft splits with attention between them, then a transformer."""

import torch
from torch import nn
from torch.nn import functional

from torch_models.layers import Block, Mlp, prepend

TOKEN_WIDTH = 64
SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding


class Performer(nn.Module):
    """Attention with positive random features and one head. Its residual connection starts at the values."""

    def __init__(self, width: int):
        super().__init__()
        self.kqv = nn.Linear(width, 3 * TOKEN_WIDTH)
        self.proj = nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(TOKEN_WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH), nn.GELU(), nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH)
        )
        self.w = nn.Parameter(torch.zeros(TOKEN_WIDTH // 2, TOKEN_WIDTH), requires_grad=False)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        exponent = functional.linear(x, self.w) - x.square().sum(dim=-1, keepdim=True) / 2
        return exponent.exp() / len(self.w) ** 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key, query, value = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        key, query = self.features(key), self.features(query)
        weights = query @ key.transpose(1, 2)  # quadratic, so that the sums have another order than in tlvit
        x = value + self.proj(weights @ value / (weights.sum(dim=-1, keepdim=True) + 1e-8))
        return x + self.mlp(self.norm2(x))


class WideAttention(nn.Module):
    """One head, scaled by the input width. Its residual connection starts at the values."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = width**-0.5
        self.qkv = nn.Linear(width, 3 * TOKEN_WIDTH, bias=False)
        self.proj = nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return value + self.proj(functional.scaled_dot_product_attention(query, key, value, scale=self.scale))


class TokenTransformer(nn.Module):
    """The T2T transformer layer."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WideAttention(width)
        self.norm2 = nn.LayerNorm(TOKEN_WIDTH)
        self.mlp = Mlp(TOKEN_WIDTH, TOKEN_WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """[B, 3, H, W] -> [B, H / 16 * W / 16, D]."""

    def __init__(self, width: int, layer: type[nn.Module]):
        super().__init__()
        self.attention1 = layer(3 * 7 * 7)
        self.attention2 = layer(TOKEN_WIDTH * 3 * 3)
        self.project = nn.Linear(TOKEN_WIDTH * 3 * 3, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for (kernel, stride, padding), layer in zip(
            SPLITS, (self.attention1, self.attention2, self.project), strict=True
        ):
            size = [(s + 2 * padding - kernel) // stride + 1 for s in x.shape[2:]]
            columns = functional.unfold(x, kernel, stride=stride, padding=padding)
            x = layer(columns.transpose(1, 2)).transpose(1, 2).unflatten(2, size)
        return x.flatten(2).transpose(1, 2)


class T2TViT(nn.Module):
    """[B, 3, H, W] -> logits [B, L]."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        ratio: int,
        grid: tuple[int, int],
        classes: int,
        tokens: str,
    ):
        super().__init__()
        self.tokens_to_token = TokensToToken(
            width, {"performer": Performer, "transformer": TokenTransformer}[tokens]
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, ratio * width, eps=1e-5) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = prepend([self.cls_token], self.tokens_to_token(images)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
