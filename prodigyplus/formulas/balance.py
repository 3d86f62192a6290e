"""Balance: the step size at which Schedule-Free's base iterate z neither drifts nor undoes its own steps.

z steps by γ·u, and x is its average. Let ``e = z − x``. A step turns e into ``e' = (1 − c)(e − γu)``. In the
norm ``‖v‖² = ⟨Pv, v⟩`` with ``Pu = g``, that of Adam's deviations,

    ‖e'‖² = (1 − c)² (‖e‖² − 2γ⟨g, e⟩ + γ²⟨g, u⟩),

and so, with ``ρ = ⟨g, x − z⟩ / (γ⟨g, u⟩)``, to first order in c,

    ρ = −½ + (‖e'‖² − ‖e‖² + 2c‖e‖²) / (2γ²⟨g, u⟩).

As long as γ is too small, z drifts away from x and keeps descending: e grows, and ρ is above 0. If gradients
are pure noise, independent of e, then e is a random walk, and ρ is 0. Once z only moves about a minimum
within its reach, e is stationary, and ρ tends to −½ whatever γ is. The target lies between: ρ near
``−TARGET``, where z is as fast as it can be without undoing its own steps.

All of this holds for each tensor by itself, and tensors come to rest at different times. If the products were
summed over all tensors, the few with the largest gradients would dominate. So ρ is a weighted mean of each
tensor's own ρ: a tensor of n elements has the weight ``‖u‖²/n^¾``, between equal weight for each element
(``‖u‖²``, since Adam's directions have an rms of about 1) and for each tensor (``‖u‖²/n``).

Time is measured in steps so far, k, so that nothing depends on how long the run will be. ρ is averaged over
about the last ``k / WINDOW`` steps, each with its γ as a further weight, and d follows it in log k:

    d log d / d log k = GROWTH · min(1, (ρ + TARGET) / 2·TARGET)    above −TARGET,
                      = ½ · max(−1, (ρ + TARGET) / (½ − TARGET))    below.

So d grows as a power of k from a start that is too small, which is a warm-up; and at −½, where all that is
left is noise, it falls as 1/√k, as theory asks when the number of steps is not known. y lies between z and x,
so ``x − z = (y − z) / β1``: no state is needed beyond Schedule-Free's own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.terms import stacks
from prodigyplus.terms.dtypes import wide_dtype

# The value of −ρ towards which balance steers d.
TARGET = 0.25

# d grows at most as this power of k, and its log by at most this much in one step.
GROWTH, LOG_LIMIT = 3.0, math.log(2)

# ρ is averaged over about the last 1/WINDOW of the run so far.
WINDOW = 4.0

# The weight of a tensor's ρ is ‖u‖² divided by this power of its number of elements.
SHARE = 0.75


def product_sum(grad: Tensor, y: Tensor, z: Tensor, dtype: torch.dtype, *, is_offset: bool) -> Tensor:
    """The local sums of ⟨g, y − z⟩, which is β1⟨g, x − z⟩; shape (count,), float64.

    Args:
        grad: The stack of gradients.
        y, z: The stacks of the weights and of the base iterates.
        dtype: The dtype of the arithmetic.
        is_offset: Whether ``z`` holds z − y instead.
    """
    lag = -z.to(dtype) if is_offset else y.to(dtype, copy=True).sub_(z)
    return _total(lag.mul_(grad))


def dot(one: Tensor, other: Tensor) -> Tensor:
    """The dot product of each pair of tensors of two stacks; shape (count,), float64."""
    return _total(one * other)


def _total(values: Tensor) -> Tensor:
    # Rows are summed in their own dtype, by pairwise summation: for float64, torch would first copy them all.
    rows = values.sum(-1) if values.ndim > 1 else values
    return stacks.total(rows, wide_dtype(values.device))


def evidence(product: Tensor, norm: Tensor, square: Tensor, numel: int | Tensor) -> tuple[Tensor, Tensor]:
    """What each tensor adds to the two sums whose ratio is ρ; shapes (count,).

    Args:
        product: ⟨g, y − z⟩ of whole tensors.
        norm: ⟨g, u⟩, with the directions u that they are moved along.
        square: ⟨u, u⟩.
        numel: The number of elements of every tensor, or of each.

    Returns:
        The weight w = ‖u‖²/numel^¾ times ``product / norm``, and w; 0 where ``norm`` is not above 0.
    """
    weight = torch.where(norm > 0, square / numel**SHARE, 0)
    return torch.where(norm > 0, product * (weight / norm), 0), weight


class Averages(NamedTuple):
    """Averages over steps of Σγwρ and Σγw, summed over tensors; their ratio is ρ. Shapes (groups,)."""

    numerator: Tensor
    denominator: Tensor


def next_d(d: Tensor, k: Tensor, averages: Averages, now: Averages) -> tuple[Tensor, Tensor, Averages]:
    """One step of the step size.

    Args:
        d: Step sizes before the step; shape (groups,).
        k: The number of the step, from 1; int64, (groups,).
        averages: The averages before the step.
        now: The sums of this step.

    Returns:
        The next ``d``, ρ, and the next averages. Where the denominator of ``now`` is not above 0, nothing was
        observed, and ``d`` stays.
    """
    count = k.to(d.dtype)
    keep = (1 - WINDOW / count).clamp(min=0)
    numerator, denominator = (old * keep + new * (1 - keep) for old, new in zip(averages, now, strict=True))
    rho = torch.where(denominator > 0, numerator / denominator, 0.0)
    above = rho + TARGET
    rise, fall = (above / (2 * TARGET)).clamp(max=1), (above / (0.5 - TARGET)).clamp(min=-1)
    power = torch.where(above > 0, GROWTH * rise, 0.5 * fall)
    grown = d * (power / count).clamp(max=LOG_LIMIT).exp()
    return torch.where(now.denominator > 0, grown, d), rho, Averages(numerator, denominator)
