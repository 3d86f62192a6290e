"""A small byte-level GPT: RMSNorm before each part, rotary attention, SwiGLU, no biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

VOCABULARY = 256
ROTARY_BASE = 10_000.0


class GPT(nn.Module):
    """Predicts the next byte at every position of a text.

    The head is a matrix of its own: of 256 rows it costs next to nothing, and a weight shared between the
    first and the last layer could be sharded with only one of them.

    Raises:
        ValueError: The width is not a multiple of twice the heads.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int, dropout: float = 0.0) -> None:
        if width % (2 * heads):
            raise ValueError(
                f"--width {width} with --heads {heads}: rotary attention takes an even width per head, so "
                f"choose a multiple of {2 * heads}."
            )
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads, context, dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self._initialize(layers, width)

    def _initialize(self, layers: int, width: int) -> None:
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # The sum over the residual stream keeps its scale whatever the depth.
                closes = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=width**-0.5 * ((2 * layers) ** -0.5 if closes else 1.0))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy, in nats per byte, of the bytes that follow ``inputs``."""
        return cross_entropy(self.logits(inputs).flatten(0, 1).float(), targets.flatten())

    def logits(self, inputs: Tensor) -> Tensor:
        """Scores of the next byte, (batch, length, 256), for bytes (batch, length)."""
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores


class Block(nn.Module):
    """Attention, then the same for every position by itself."""

    def __init__(self, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, context)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """One more turn of the residual stream."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        mlp: Tensor = self.dropout(self.mlp(self.mlp_norm(x)))
        return x + mlp


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.head_width = width // heads
        # Query, key and value of one head lie together, so that tensor parallelism cuts between heads.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        angles = rotary_angles(context, self.head_width)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Every position sees itself and those before it."""
        length = x.shape[1]
        # As many heads as this process holds: (batch, heads, length, head width) each.
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3 * self.head_width)).transpose(1, 2).chunk(3, dim=-1)
        cos, sin = self.cos[:length], self.sin[:length]
        mixed = scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """A hidden layer of about 8/3 of the width, gated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // (3 * 32)) * 32
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Each position by itself."""
        out: Tensor = self.down(silu(self.gate(x)) * self.up(x))
        return out


def rotary_angles(context: int, width: int) -> Tensor:
    """The angle by which every pair of numbers is turned at every position, (context, width / 2)."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, width, 2) / width)
    return torch.outer(torch.arange(context, dtype=torch.float32), frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of numbers of ``x``, (…, length, width), by the angle of its position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)
