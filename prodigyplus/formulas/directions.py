"""From a gradient and its second moment to a direction of unit scale: pure functions on tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Makes Adam-atan2's direction 1 where g² equals its average, as Adam's is.
ATAN2_SCALE = 4 / math.pi


def adam_(grad: Tensor, deviation: Tensor) -> Tensor:
    """``g / (sqrt(V)/d + eps)``, in place in ``deviation``, which is the denominator, with eps added.

    This equals Adam's ``d·g / (sqrt(V) + d·eps)``, where V is the second moment of ``d·g``.
    """
    return torch.div(grad, deviation, out=deviation)


def atan2_(grad: Tensor, deviation: Tensor) -> Tensor:
    """``(4/π)·atan2(g, sqrt(V)/d)``, in place in ``deviation``: Adam-atan2 (arXiv 2407.05872, eq. 34)."""
    return torch.atan2(grad, deviation, out=deviation).mul_(ATAN2_SCALE)


def stable_scale(square_sum: Tensor, numel: int | Tensor) -> Tensor:
    """StableAdamW's factor ``1 / sqrt(max(1, rms(u)))`` (arXiv 2304.13013), from the sum of u²."""
    return square_sum.div(numel).sqrt_().clamp_(min=1).rsqrt_()
