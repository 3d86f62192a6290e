"""Options that change a direction or a move: pure functions on tensors.

========================  ================================================================
``use_adopt``             ADOPT, arXiv 2411.02853
``use_cautious``          Cautious Optimizers, arXiv 2411.16085, algorithm 1
``use_grams``             Grams, arXiv 2412.17107, algorithm 1
``use_orthograd``         OrthoGrad, arXiv 2501.04697, eq. 9
``use_focus``             FOCUS, arXiv 2501.12243, algorithm 1
========================  ================================================================
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.terms import stacks
from prodigyplus.terms.dtypes import wide_dtype

# FOCUS: how strongly the average of the weights attracts, relative to the sign of the gradient.
_ATTRACTION = 0.1

# Cautious: a lower bound of the fraction that agrees; without it, a few elements would step too far.
_SMALLEST_FRACTION = 1e-3

# OrthoGrad: below this many rounding errors, what is left of a direction is scaled down.
_ROUNDINGS = 128

# OrthoGrad: weights with a smaller norm count as zero.
_SMALLEST_NORM = 1e-30

# How many elements are widened to float64 at a time.
_RUN = 1 << 20


def cautious_(proposed: Tensor, gradient: Tensor) -> Tensor:
    """Cautious, in place: zero ``proposed`` where its sign is not the gradient's. Overwrites ``gradient``.

    Returns:
        How many elements of each tensor of the stack agree in sign; in its dtype, shape (count,).
    """
    agrees = gradient.mul_(proposed).gt_(0)
    proposed.mul_(agrees)
    return stacks.total(agrees)


def scale_up_(masked: Tensor, agreeing: Tensor, numel: int) -> None:
    """Cautious, in place: divide the result of :func:`cautious_` by the fraction of elements that agree.

    Args:
        masked: A stack of local tensors.
        agreeing: How many elements of each whole tensor agree; shape (count,).
        numel: The number of elements of a whole tensor.
    """
    masked.div_(stacks.across((agreeing / numel).clamp_(min=_SMALLEST_FRACTION), masked))


def grams_(proposed: Tensor, gradient: Tensor) -> Tensor:
    """Grams, in place: give ``proposed`` the gradient's signs. Overwrites ``gradient``."""
    return proposed.abs_().mul_(gradient.sign_())


def adopt_observes(step: Tensor) -> Tensor:
    """ADOPT: False at the first step, whose gradient only starts the second moment; bool."""
    return step > 1


def adopt_clip_(normalised: Tensor, clip: Tensor) -> Tensor:
    """ADOPT, in place: clip a normalised gradient to ±k^¼ (``clip``) before it enters the first moment."""
    return normalised.clamp_(-clip, clip)


def focus(numerator: Tensor, average: Tensor, weight: Tensor) -> Tensor:
    """FOCUS: ``sign(numerator) − 0.1·sign(average − weight)``, a new tensor."""
    return numerator.sign().sub_((average - weight).sign_(), alpha=_ATTRACTION)


class Dots(NamedTuple):
    """⟨u, u⟩, ⟨w, u⟩ and ⟨w, w⟩ of directions u and weights w; shapes (count,)."""

    uu: Tensor
    wu: Tensor
    ww: Tensor


def dots(direction: Tensor, weight: Tensor) -> Dots:
    """The dot products of two stacks of local tensors, (count, *shape); products and sums in float64.

    Differences of these sums show how much of the direction is orthogonal to the weights.
    """
    wide, count = wide_dtype(direction.device), len(direction)
    sums = direction.new_zeros(3, count, dtype=wide)
    runs = (torch.split(tensor.reshape(count, -1), _RUN, 1) for tensor in (direction, weight))
    for u, w in zip(*runs, strict=True):
        u, w = u.to(wide), w.to(wide)
        pairs = ((u, u), (w, u), (w, w))
        sums += torch.stack([torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1) for a, b in pairs])
    return Dots(*sums.unbind())


class Projection(NamedTuple):
    """OrthoGrad's direction is ``(u − along·w)·scale``; ``square`` is its sum of squares. Shapes (count,)."""

    along: Tensor
    scale: Tensor
    square: Tensor


def projection(whole: Dots, dtype: torch.dtype) -> Projection:
    """OrthoGrad: the part of u that is orthogonal to w, scaled to the norm of u.

    In closed form: ``‖u − (⟨w,u⟩/⟨w,w⟩) w‖² = ⟨u,u⟩ − ⟨w,u⟩²/⟨w,w⟩``. Where that is no more than the rounding
    error of u's elements, or of these sums, u is parallel to w, and the step fades to zero: what is left of u
    is rounding error.

    Args:
        whole: The sums over whole tensors.
        dtype: The dtype of u.
    """
    uu, wu, ww = whole
    along = torch.where(ww > _SMALLEST_NORM**2, wu / ww, 0.0)
    left = (uu - along * wu).clamp(min=0)
    rounding = max((_ROUNDINGS * torch.finfo(dtype).eps) ** 2, _ROUNDINGS * torch.finfo(uu.dtype).eps)
    square = uu / torch.maximum(left, rounding * uu).clamp(min=torch.finfo(uu.dtype).tiny)
    return Projection(along.to(dtype), square.sqrt().to(dtype), (square * left).to(dtype))
