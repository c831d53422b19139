"""The transformer block of the PyTorch models in the tests, built from `torch.nn`."""

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Softmax attention with one fused qkv projection."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2)
        )
        return self.proj(
            functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block. `residual` divides both branches."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        eps: float,
        qkv_bias: bool = False,
        residual: float = 1.0,
    ):
        super().__init__()
        self.residual = residual
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x)) / self.residual
        return x + self.mlp(self.norm2(x)) / self.residual


def prepend(tokens: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Learned tokens [1, 1, D] in front of [B, N, D]."""
    return torch.cat([t.expand(len(x), -1, -1) for t in tokens] + [x], dim=1)
