"""Balance: the step size at which Schedule-Free's base iterate z neither travels nor shakes.

z steps by γ·u, and x is its average. Let ``e = z − x``. A step makes ``(1 − c)(e − γu)`` of it. In the norm
``‖v‖² = ⟨Pv, v⟩`` with ``Pu = g``, that of Adam's deviations, it becomes

    ‖e'‖² = (1 − c)² (‖e‖² − 2γ⟨g, e⟩ + γ²⟨g, u⟩),

and with ``ρ = ⟨g, x − z⟩ / (γ⟨g, u⟩)``, to first order in c,

    ρ = −½ + (‖e'‖² − ‖e‖² + 2c‖e‖²) / (2γ²⟨g, u⟩).

As long as γ is too small, z travels away from x and keeps descending: e grows, and ρ is above 0. Where
gradients know nothing of e, as pure noise does, e walks at random, and ρ is 0. Once z moves about a minimum
within its reach, e is stationary, and ρ tends to −½ whatever γ is. What is sought lies between: ρ near
``−TARGET``, where z is as fast as it can be without undoing its own steps.

All of this holds for each tensor by itself, and tensors come to rest at different times. In the sums over all
of them, the few whose gradients are largest would speak for the rest. So ρ is a mean of the tensors' own: one
of n elements has the weight ``‖u‖²/n^¾``, between each element's counting the same (``‖u‖²``, since Adam's
directions have an rms of about 1) and each tensor's (``‖u‖²/n``).

Everything goes by the number k of the step, so that nothing depends on how long a run is. ρ is averaged over
about the last ``k / WINDOW`` steps, each with its γ as a further weight, and d follows it in log k:

    d log d / d log k = GROWTH · min(1, (ρ + TARGET) / 2·TARGET)    above −TARGET,
                      = ½ · max(−1, (ρ + TARGET) / (½ − TARGET))    below.

So d grows as a power of k from a start that is too small, which is a warm-up; and at −½, where all that is
left is noise, it falls as 1/√k, as theory asks of steps whose number is not known. y lies between z and x, so
``x − z = (y − z) / β1``: there is no state beside Schedule-Free's own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.terms import stacks
from prodigyplus.terms.layout import wide_dtype

# The −ρ that d is led to.
TARGET = 0.25

# To which power of the step's number d grows at most, and by how much in one step.
GROWTH, LOG_LIMIT = 3.0, math.log(2)

# The average of ρ is over the last of so many parts of the run.
WINDOW = 4.0

# By which power of its number of elements the weight of a tensor's ρ is less than its ‖u‖².
SHARE = 0.75


def product_sum(grad: Tensor, y: Tensor, z: Tensor, dtype: torch.dtype, *, is_offset: bool) -> Tensor:
    """The local sums of ⟨g, y − z⟩, that is of β1⟨g, x − z⟩; shape (count,), in float64.

    Args:
        grad: A stack of gradients.
        y, z: Those of the weights and of the base iterates, or with ``is_offset`` of z − y.
        dtype: That of the arithmetic.
        is_offset: See ``z``.
    """
    lag = -z.to(dtype) if is_offset else y.to(dtype, copy=True).sub_(z)
    return _total(lag.mul_(grad))


def dot(one: Tensor, other: Tensor) -> Tensor:
    """The sums of the products of two stacks, of each of their tensors; (count,), in float64."""
    return _total(one * other)


def _total(values: Tensor) -> Tensor:
    # A row is summed in its own dtype, pair by pair: in float64, torch would copy all of it first.
    rows = values.sum(-1) if values.ndim > 1 else values
    return stacks.total(rows, wide_dtype(values.device))


def evidence(product: Tensor, norm: Tensor, square: Tensor, numel: int | Tensor) -> tuple[Tensor, Tensor]:
    """What each tensor adds to the sums that ρ is the ratio of; shapes (count,).

    Args:
        product: ⟨g, y − z⟩ of whole tensors.
        norm: ⟨g, u⟩ of the directions u that they are moved by.
        square: ⟨u, u⟩.
        numel: How many elements a tensor has, or each of them.

    Returns:
        The weight w = ‖u‖²/numel^¾ times ``product / norm``, and w; 0 where ``norm`` is not above 0.
    """
    weight = torch.where(norm > 0, square / numel**SHARE, 0)
    return torch.where(norm > 0, product * (weight / norm), 0), weight


class Averages(NamedTuple):
    """What ρ is the ratio of: averages over steps of the sums of γwρ and of γw, of all tensors; (groups,)."""

    numerator: Tensor
    denominator: Tensor


def next_d(d: Tensor, k: Tensor, averages: Averages, now: Averages) -> tuple[Tensor, Tensor, Averages]:
    """One step of the step size.

    Args:
        d: Step sizes before the step; shape (groups,).
        k: The number of the step, from 1; int64, (groups,).
        averages: Those before the step.
        now: What the step adds to them.

    Returns:
        The next ``d``, ρ, and the next averages. Where ``now`` has no denominator above 0, nothing was
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
