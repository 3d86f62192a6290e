"""The dtypes that a step computes in."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of numbers and sums that need more precision: float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on a tensor: its own, but at least float32."""
    return _promoted(tensor.dtype, torch.float32)


_promoted = functools.cache(torch.promote_types)  # called for every parameter at every step
