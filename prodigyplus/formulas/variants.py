"""Changes to a direction that another option asks for: pure functions on tensors.

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
from prodigyplus.terms.layout import wide_dtype

# FOCUS: how strongly the weights' average attracts, against the gradient's sign.
_ATTRACTION = 0.1

# Cautious: at least this fraction of the elements is taken to agree, or the few that do would step far.
_SMALLEST_FRACTION = 1e-3

# OrthoGrad: what is left of a direction counts in full from this many roundings on.
_ROUNDINGS = 128

# OrthoGrad: weights of a smaller norm are zero to rounding.
_SMALLEST_NORM = 1e-30

# How many elements are widened to float64 at a time.
_RUN = 1 << 20


def cautious_(proposed: Tensor, gradient: Tensor) -> Tensor:
    """Cautious, in place in ``proposed``: zero where it has not the gradient's sign. Overwrites ``gradient``.

    Returns:
        How many elements of each tensor of the stack have; in its dtype, shape (count,).
    """
    agrees = gradient.mul_(proposed).gt_(0)
    proposed.mul_(agrees)
    return stacks.total(agrees)


def scale_up_(masked: Tensor, agreeing: Tensor, numel: int) -> None:
    """Cautious, in place: divide what :func:`cautious_` has left by the fraction of elements that agree.

    Args:
        masked: A stack of local tensors.
        agreeing: How many elements of each whole tensor agree; shape (count,).
        numel: How many elements a whole tensor has.
    """
    masked.div_(stacks.across((agreeing / numel).clamp_(min=_SMALLEST_FRACTION), masked))


def grams_(proposed: Tensor, gradient: Tensor) -> Tensor:
    """Grams, in place in ``proposed``: its magnitudes, the signs of the gradient. Overwrites ``gradient``."""
    return proposed.abs_().mul_(gradient.sign_())


def adopt_observes(step: Tensor) -> Tensor:
    """ADOPT: bool, False at the first step, whose gradient starts the second moment and does nothing else."""
    return step > 1


def adopt_clip_(normalised: Tensor, clip: Tensor) -> Tensor:
    """ADOPT, in place: hold a normalised gradient, before it enters the first moment, to ±k^¼."""
    return normalised.clamp_(-clip, clip)


def focus(numerator: Tensor, average: Tensor, weight: Tensor) -> Tensor:
    """FOCUS: ``sign(m) + γ·sign(w − average of w)``, a new tensor; γ is 0.1."""
    return numerator.sign().sub_((average - weight).sign_(), alpha=_ATTRACTION)


class Dots(NamedTuple):
    """⟨u, u⟩, ⟨w, u⟩ and ⟨w, w⟩ of directions u and weights w; shapes (count,)."""

    uu: Tensor
    wu: Tensor
    ww: Tensor


def dots(direction: Tensor, weight: Tensor) -> Dots:
    """Of two stacks of local tensors, (count, *shape), in float64 from the products on.

    The differences of these sums say how much of the direction is orthogonal to the weights.
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
    """The direction ``(u − along·w)·scale``, and the sum of its squares; shapes (count,)."""

    along: Tensor
    scale: Tensor
    square: Tensor


def projection(whole: Dots, dtype: torch.dtype) -> Projection:
    """OrthoGrad: what of u is orthogonal to w, scaled to the norm of u.

    In closed form: ``‖u − (⟨w,u⟩/⟨w,w⟩) w‖² = ⟨u,u⟩ − ⟨w,u⟩²/⟨w,w⟩``. Where that is no more than the rounding
    of u's elements, or of these sums, u is parallel to w, and the step fades to nothing rather than be made
    of rounding.

    Args:
        whole: The sums over the whole tensors.
        dtype: That of u.
    """
    uu, wu, ww = whole
    along = torch.where(ww > _SMALLEST_NORM**2, wu / ww, 0.0)
    left = (uu - along * wu).clamp(min=0)
    rounding = max((_ROUNDINGS * torch.finfo(dtype).eps) ** 2, _ROUNDINGS * torch.finfo(uu.dtype).eps)
    square = uu / torch.maximum(left, rounding * uu).clamp(min=torch.finfo(uu.dtype).tiny)
    return Projection(along.to(dtype), square.sqrt().to(dtype), (square * left).to(dtype))
