"""Prodigy (arXiv 2306.06101, algorithm 4): the step size ``d``, and its evidence.

Prodigy divides a sum of ⟨g, p0 − z⟩ over the steps by a norm of the sum of the gradients, both on samples:
every ``slice_p``-th element. What each step adds depends on the kind of evidence, which ``use_speed`` sets:

================  ==========================================  =============================================
kind              product                                     norm
================  ==========================================  =============================================
``"products"``    ⟨g, p0 − z⟩                                 ‖s‖₁, with ``s ← β3 s + w·g``
``"signs"``       the sign of ⟨g, p0 − z⟩                     ‖s‖₁, with ``s ← β3 s + w·sign(g)``
``"relative"``    its average ``m ← (1−k^-¾) m + k^-¾ ⟨…⟩``,  ‖p0 − z‖₂, the largest so far; only reported
                  divided by the largest ‖p0 − z‖₁ so far and
                  by ``(1 + ‖p0 − z‖₂)²``, also the largest
================  ==========================================  =============================================

``w`` is :func:`evidence_weight`, which also multiplies the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.terms import stacks
from prodigyplus.terms.dtypes import wide_dtype
from prodigyplus.terms.step_numbers import StepNumbers

# How far the limiter lets d grow in one step.
LIMIT = 2**0.25

# With SPEED, the next d is at most d to this power; d is below 1.
SPEED_LIMIT = 0.975

# See shared_d(): how many times d0 a d must exceed to count in the mean; how many times smaller than the mean
# a late one may be when it joins; and the last step that is not late.
LEAST_GROWTH, NEAR, EARLY = 10.0, 10.0, 30

# A lower bound of distances.
_SMALLEST_DISTANCE = 1e-8

# The state of a parameter with SPEED "relative".
AVERAGES = ("exp_avg_product", "max_l1", "max_l2")


def evidence_sums_(
    grad: Tensor, base: Tensor, state: Mapping[str, Tensor], kind: str, n: StepNumbers
) -> dict[str, Tensor]:
    """Update ``s`` in ``state``, and return the local sums that :func:`evidence_` needs.

    Products are rounded once and summed in float64, so that the sums hardly depend on how a tensor is
    sharded.

    Args:
        grad: Samples of a stack's raw gradients, in the dtype of the numbers, gated; (count, samples).
        base: Samples of z, or without Schedule-Free of y; the same shape.
        state: The stack's state.
        kind: The kind of the evidence.
        n: The numbers of the step.

    Returns:
        Sums by name; shapes (count,), float64.
    """
    distance = state["p0"].to(grad.dtype, copy=True).sub_(base)
    if kind == "relative":
        distances = {"l1": distance.abs(), "l2_square": distance.square(), "product": distance.mul_(grad)}
        return {name: stacks.total(values, wide_dtype(grad.device)) for name, values in distances.items()}
    product = stacks.total(distance.mul_(grad), wide_dtype(grad.device))
    s = state["s"]
    # On a GPU, bfloat16 times a 0-dim tensor would round that number to bfloat16 first.
    s.copy_(s.to(grad.dtype).mul_(n.beta3))
    s.add_((grad.sign() if kind == "signs" else grad) * n.evidence_weight)
    return {"product": product, "norm": stacks.total(s.abs(), wide_dtype(grad.device))}


def evidence_(
    sums: Mapping[str, Tensor], state: Mapping[str, Tensor], kind: str, n: StepNumbers
) -> tuple[Tensor, Tensor]:
    """Products and norms (see the module docstring) from sums over whole tensors; shapes (count,).

    They are zero where the gradient does not count. SPEED "relative" updates its averages in ``state``.
    """
    if kind == "relative":
        product, norm = _relative_(sums, state, n)
    else:
        product, norm = sums["product"], sums["norm"]
    if kind == "signs":
        product = product.sign()
    return torch.where(n.observes, product, 0), torch.where(n.observes, norm, 0)


def _relative_(
    sums: Mapping[str, Tensor], state: Mapping[str, Tensor], n: StepNumbers
) -> tuple[Tensor, Tensor]:
    average, l1, l2 = (state[key] for key in AVERAGES)
    new, weight = sums["product"].to(average.dtype), n.ema_weight.to(average.dtype)
    started = l1 > 0  # False until the first observation, which starts the average
    moved = {
        average: torch.lerp(torch.where(started, average, new), new, weight),
        l1: sums["l1"].clamp(min=_SMALLEST_DISTANCE).maximum(l1),
        l2: sums["l2_square"].sqrt().clamp(min=_SMALLEST_DISTANCE).maximum(l2),
    }
    for kept, value in moved.items():
        kept.copy_(torch.where(n.observes, value, kept))
    return average / (l1 * (1 + l2).square()), l2


def evidence_weight(d: Tensor, d0: float | Tensor, sqrt_d0: float | Tensor, kind: str) -> Tensor:
    """A step's weight in Prodigy's statistics: d²/sqrt(d0); of signs, sqrt(d)·d0."""
    return d.sqrt() * d0 if kind == "signs" else d.square() / sqrt_d0


class Evidence(NamedTuple):
    """What ``d`` is estimated from; shapes (groups,).

    Args:
        numerator: The decayed sum of the weighted products, before this step.
        largest: The largest numerator so far.
        product, norm: This step's weighted product and norm, summed over the group.
    """

    numerator: Tensor
    largest: Tensor
    product: Tensor
    norm: Tensor


class Estimator(NamedTuple):
    """How ``d`` follows its evidence; numbers, or tensors of shape (groups,).

    Args:
        d0: The value that ``d`` starts from.
        d_coef: Multiplies the estimate.
        beta3: Decay of the numerator.
        beta4: Decay of ``d`` itself, which can then shrink too; None if ``d`` never shrinks.
        kind: The kind of the evidence.
        limit: How far the estimate may grow in one step, see :meth:`limit_of`; None without the limiter.
        speed_coef: See :meth:`speed_coef_of`.
    """

    d0: float | Tensor
    d_coef: float | Tensor
    beta3: float | Tensor
    beta4: float | Tensor | None
    kind: str
    limit: float | Tensor | None
    speed_coef: float | Tensor

    @staticmethod
    def limit_of(d_coef: float) -> float:
        """How far the limiter lets an estimate grow in one step, before ``d_coef`` multiplies it."""
        # With d_coef below 1, the limit is on the product: otherwise d could not grow.
        return LIMIT / min(1.0, d_coef)

    @staticmethod
    def speed_coef_of(d_coef: float) -> float:
        """The factor of the estimate with SPEED "relative"."""
        return float(d_coef**0.125)


def next_d(d: Tensor, evidence: Evidence, by: Estimator) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Prodigy's step size.

    Args:
        d: Step sizes before the step; shape (groups,).
        evidence: The evidence before this step, and this step's.
        by: How ``d`` follows it.

    Returns:
        The next ``d``, the estimate d̂, and the next numerator. Where the norm is zero, nothing was observed,
        and ``d`` stays.
    """
    numerator, largest, product, norm = evidence
    before = numerator
    numerator = numerator * by.beta3
    # Until d has grown, negative products would only hold it down.
    numerator = torch.where((d > by.d0) | (product > 0), numerator + product, numerator)
    if by.kind == "relative":
        grows = (numerator >= largest) & (numerator > 0) & (before > 0)
        d_hat = torch.where(grows, d * (numerator / before).sqrt().clamp(max=LIMIT), d)
        estimate = torch.where(grows, d_hat * by.speed_coef, d)
    else:
        d_hat = numerator / norm
        if by.kind == "signs":
            estimate = torch.minimum(d_hat * by.d_coef, d**SPEED_LIMIT)
        else:
            limited = d_hat if by.limit is None else torch.minimum(d_hat, d * by.limit)
            estimate = limited * by.d_coef
    if by.beta4 is None:
        moved = torch.maximum(d, estimate)
    else:
        moved = d * by.beta4 + estimate.clamp(min=by.d0) * (1 - by.beta4)
    return torch.where(norm > 0, moved, d), d_hat, numerator


def shared_d(
    d: Tensor, d0: float | Tensor, weight_sum: Tensor, k: Tensor, in_mean: Tensor
) -> tuple[Tensor, Tensor]:
    """The step size in use in groups that share one: the harmonic mean of ``d`` over those with evidence.

    ``d0`` is chosen too small, so a ``d`` that has not grown tenfold is no evidence. In their first steps,
    groups that start together count as soon as they have left ``d0``, and for good once they have grown
    tenfold. A group that grows tenfold later (it was just added, or its gradients are noise) joins the mean
    once it is near it. So a group that has nothing to learn, is frozen at its start or was just added does
    not hold the others back: it moves by their mean. If no group counts, the mean is over all that moved.

    Args:
        d, d0, weight_sum, k, in_mean: Numbers of the groups, see ``terms/group_numbers.py``; (groups,).

    Returns:
        The mean for every group that has moved, and its own ``d`` for every other; and the next ``in_mean``.
    """
    moved, counts = weight_sum > 0, in_mean > 0
    is_early = (k == k.max()) & (k <= EARLY)
    is_near = d * NEAR >= _harmonic_mean(d, moved & counts)
    counts = moved & (counts | ((d > LEAST_GROWTH * d0) & (is_early | is_near)))
    over = counts | (moved & is_early & (d > d0))
    over = torch.where(over.any(), over, moved)
    return torch.where(moved, _harmonic_mean(d, over), d), counts.to(d.dtype)


def _harmonic_mean(d: Tensor, where: Tensor) -> Tensor:
    """The harmonic mean of ``d`` where ``where`` (bool) holds, 0-dim; 0 if it holds nowhere."""
    total = torch.where(where, 1 / d, 0.0).sum()
    return torch.where(total > 0, where.sum() / total, 0.0)
