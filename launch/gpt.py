"""A small byte-level GPT: pre-norm with RMSNorm, rotary attention, SwiGLU, no biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

VOCABULARY = 256
ROTARY_BASE = 10_000.0


class GPT(nn.Module):
    """Predicts the next byte at every position of a text.

    The output head is not tied to the embedding: with 256 rows it costs next to nothing, and a tied weight
    could be sharded with only one of the two layers.

    Raises:
        ValueError: The width is not a multiple of twice the number of heads.
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
                # Scaled by depth, so that the variance of the residual stream does not grow with it.
                writes_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=width**-0.5 * ((2 * layers) ** -0.5 if writes_residual else 1.0))

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
    """A transformer block: attention, then an MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, context)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
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
        # Query, key and value of a head are adjacent rows, so that tensor parallelism splits between heads.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        angles = rotary_angles(context, self.head_width)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the same and all earlier positions."""
        length = x.shape[1]
        # The heads of this process: (batch, heads, length, head width) each.
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3 * self.head_width)).transpose(1, 2).chunk(3, dim=-1)
        cos, sin = self.cos[:length], self.sin[:length]
        mixed = scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """A gated MLP with a hidden size of about 8/3 of the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // (3 * 32)) * 32
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to every position."""
        out: Tensor = self.down(silu(self.gate(x)) * self.up(x))
        return out


def rotary_angles(context: int, width: int) -> Tensor:
    """The rotation angle of each pair of features at each position, (context, width / 2)."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, width, 2) / width)
    return torch.outer(torch.arange(context, dtype=torch.float32), frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of features of ``x``, (…, length, width), by the angle of its position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)
