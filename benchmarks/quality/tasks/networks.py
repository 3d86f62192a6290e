"""Small networks for images of 28 × 28 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

CLASSES = 10
PATCH = 7  # pixels
PATCHES = (28 // PATCH) ** 2
HEAD_WIDTH = 32
GROUPS = 4  # of GroupNorm, which, unlike BatchNorm, has no statistics from the weights that were trained at


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        inner = relu(self.norms[0](self.first(x)))
        return relu(x + self.norms[1](self.second(inner)))


def residual_network(width: int, layers: int) -> nn.Sequential:
    """A residual network of two resolutions."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.ReLU(),
        *(Residual(width) for _ in range(layers)),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        *(Residual(2 * width) for _ in range(layers)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, CLASSES),
    )


class VisionTransformer(nn.Module):
    """A transformer over patches."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn(PATCHES, width) * width**-0.5)
        layer = nn.TransformerEncoderLayer(
            width, width // HEAD_WIDTH, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        scores: Tensor = self.head(self.norm(self.blocks(x)).mean(dim=1))
        return scores
