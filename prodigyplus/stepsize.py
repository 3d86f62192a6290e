"""Prodigy's step size ``d`` (arXiv 2306.06101, algorithm 4): a group's numbers, and how they move.

The numbers of a group live in its ``param_groups`` entry, as tensors without dimensions on the device
of the parameters. No step reads one back: every decision is a ``torch.where``, and a step that must
change nothing is a step whose numbers are chosen so that it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodigyplus.options import Options

# How far the limiter lets d grow in one step.
_LIMIT = 2**0.25

_CPU = torch.device("cpu")


def first_numbers(d0: float) -> dict[str, float | int]:
    """A new group's numbers, each as a plain number; the keys are those of ``param_groups``.

    ===============  =================================================================================
    ``d``            step size of the group
    ``shared_d``     step size that multiplies ``lr``: ``d``, or the harmonic mean over the groups
    ``d_hat``        last estimate ``d_numerator / d_denom``, before limiter and ``d_coef``
    ``d_numerator``  N of SPEC's step 7, the decayed sum of ⟨g, p0 − z⟩, weighted
    ``d_denom``      ‖s‖₁ of the last step
    ``weight_sum``   Σ dlr², the Schedule-Free weights so far
    ``effective_lr`` lr·(1 − β1(1 − c)) of the last step
    ``k``            steps that counted so far
    ``skipped``      steps skipped for an inf or NaN in a gradient
    ===============  =================================================================================
    """
    numbers = dict.fromkeys(("d", "shared_d", "d_hat"), float(d0))
    zeros = dict.fromkeys(("d_numerator", "d_denom", "weight_sum", "effective_lr"), 0.0)
    return {**numbers, **zeros, "k": 0, "skipped": 0}


NUMBERS = tuple(first_numbers(1.0))
COUNTS = ("k", "skipped")


def as_number(name: str, value: float | Tensor, device: torch.device = _CPU) -> Tensor:
    """A group's number as a 0-dim tensor on ``device``: int64, or float64 where the device has it."""
    floating = torch.float32 if device.type == "mps" else torch.float64
    return torch.as_tensor(value, dtype=torch.int64 if name in COUNTS else floating, device=device)


def lift(group: dict[str, Any], device: torch.device) -> None:
    """Make a group's numbers tensors on ``device``."""
    group.update({name: as_number(name, group[name], device) for name in NUMBERS})


class Scalars(NamedTuple):
    """The numbers of a group that one step's arithmetic uses: 0-dim tensors, one dtype and device.

    Where the step is not to happen, what keeps something is 1 and what adds to something is 0.
    """

    happens: Tensor  # bool: whether this step changes anything
    step: Tensor  # int64: number of this step, from 1
    d: Tensor
    eps: Tensor  # 0 for Adam-atan2, which needs none
    statistic: Tensor  # d²/sqrt(d0), the weight of this gradient in Prodigy's statistics
    beta2: Tensor  # decay of the second moment
    square: Tensor  # (1 − β2) d², the weight of this g² in it
    beta1: Tensor  # decay of the first moment, without Schedule-Free
    gradient: Tensor  # (1 − β1) d, the weight of this g in it
    unit: Tensor  # 1
    dlr: Tensor  # d·lr
    decay: Tensor  # what weight decay takes off a weight: λ·dlr, or λ
    c: Tensor  # Schedule-Free's averaging weight
    xy: Tensor  # 1 − β1 (1 − c), how much of z's step y makes

    def only_if(self, condition: Tensor) -> Scalars:
        """These, if ``condition`` (bool, 0-dim) holds as well; else those of no step."""
        kept = {name: torch.where(condition, getattr(self, name), 1) for name in ("beta1", "beta2")}
        added = {
            name: torch.where(condition, getattr(self, name), 0)
            for name in ("square", "gradient", "unit", "dlr", "decay", "c")
        }
        return self._replace(happens=self.happens & condition, **kept, **added)

    def admit(self, values: Tensor) -> Tensor:
        """``values``, or zeros if the step is not to happen: keeps 0·inf out of what follows."""
        return torch.where(self.happens, values, 0)


class GroupStep:
    """One parameter group during one step.

    Args:
        group: The entry of ``param_groups``; its numbers are tensors (see :func:`lift`).
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self.numbers = group
        self.options = Options.of(group)
        self.adapts = self.options.adapts(group["calls"])
        # Until a step has moved the weights, state may be older than the weights it belongs to.
        self.moved_before = group["calls"] > 0
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._scalars: dict[tuple[torch.device, torch.dtype], Scalars] = {}

    def open(self, happens: Tensor, skips: Tensor) -> None:
        """Fix this step's numbers, once it is known whether it happens.

        Args:
            happens: bool, 0-dim: False if this call is to change nothing.
            skips: bool, 0-dim: whether that is because a gradient is not finite.
        """
        o, numbers = self.options, self.numbers
        d, weight_sum = numbers["d"], numbers["weight_sum"]
        zero, one = torch.zeros_like(d), torch.ones_like(d)
        self.happens = happens
        dlr = numbers["shared_d"] * o.lr
        weight = dlr.square()
        new_sum = weight_sum + weight
        c = torch.where(new_sum > 0, weight / new_sum, zero)
        beta1, beta2 = o.betas
        if o.schedulefree_c > 0:
            c = (c * ((1 - beta1) * o.schedulefree_c)).clamp_(max=1)
        xy = 1 - beta1 * (1 - c)
        self._exact = Scalars(
            happens=torch.ones_like(happens),
            step=numbers["k"] + 1,
            d=d,
            eps=one * (o.eps or 0.0),
            statistic=d.square() / math.sqrt(o.d0),
            beta2=one * beta2,
            square=(1 - beta2) * d.square(),
            beta1=one * beta1,
            gradient=(1 - beta1) * d,
            unit=one,
            dlr=dlr,
            decay=o.weight_decay * (dlr if o.weight_decay_by_lr else one),
            c=c,
            xy=xy,
        ).only_if(happens)
        self._scalars.clear()

        effective_lr = o.lr * (xy if o.use_schedulefree else one)
        for name, value in (("weight_sum", new_sum), ("effective_lr", effective_lr)):
            numbers[name].copy_(torch.where(happens, value, numbers[name]))
        numbers["k"].add_(happens)
        numbers["skipped"].add_(skips)

    def scalars(self, device: torch.device, dtype: torch.dtype) -> Scalars:
        """The numbers of this step on ``device``, floating ones in ``dtype``."""
        key = device, dtype
        if key not in self._scalars:
            self._scalars[key] = Scalars(
                *(value.to(*key) if value.is_floating_point() else value.to(device) for value in self._exact)
            )
        return self._scalars[key]

    def observe(self, product: Tensor, norm: Tensor) -> None:
        """Take in one parameter's Prodigy statistics: ⟨g, p0 − z⟩ and ‖s‖₁, over its whole tensor."""
        self._statistics.append((product, norm))

    def totals(self) -> Tensor:
        """The group's sums of this step: numerator (weighted) and denominator, as a tensor of two."""
        d: Tensor = self.numbers["d"]
        if not self._statistics:
            return d.new_zeros(2)
        flat = [value.to(d.device, d.dtype) for pair in self._statistics for value in pair]
        totals = torch.stack(flat).view(-1, 2).sum(dim=0)
        return torch.stack((totals[0] * self._exact.statistic, totals[1]))

    def adapt(self, totals: Tensor, happens: Tensor) -> None:
        """Move ``d`` by sums of the step (see :meth:`totals`), if it happens."""
        numbers = self.numbers
        d, d_hat, numerator = next_d(numbers["d"], numbers["d_numerator"], totals, self.options)
        d_hat = torch.where(totals[1] > 0, d_hat, numbers["d_hat"])
        for name, value in (("d", d), ("d_hat", d_hat), ("d_numerator", numerator), ("d_denom", totals[1])):
            numbers[name].copy_(torch.where(happens, value, numbers[name]))

    def follow(self, leader: GroupStep) -> None:
        """Take over the step size of a group that adapts for both."""
        for name in ("d", "d_hat", "d_numerator", "d_denom"):
            self.numbers[name].copy_(leader.numbers[name])


def next_d(d: Tensor, numerator: Tensor, totals: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Prodigy's step size.

    Args:
        d, numerator: ``d`` and N before the step; 0-dim.
        totals: The step's sums over the group, ⟨g, p0 − z⟩·d²/sqrt(d0) and ‖s‖₁; shape (2,).
        options: Those of the group.

    Returns:
        The next ``d``, the estimate ``N/‖s‖₁`` and the next N; 0-dim. Where ‖s‖₁ is zero, ``d`` stays.
    """
    product, norm = totals.unbind()
    numerator = options.prodigy_beta * numerator
    # Until progress is made, what is negative would only hold d down.
    numerator = torch.where((d > options.d0) | (product > 0), numerator + product, numerator)
    d_hat = numerator / norm
    limited = torch.minimum(d_hat, _LIMIT * d) if options.d_limiter else d_hat
    estimate = options.d_coef * limited
    if options.d_beta > 0:
        moved = options.d_beta * d + (1 - options.d_beta) * estimate.clamp(min=options.d0)
    else:
        moved = torch.maximum(d, estimate)
    return torch.where(norm > 0, moved, d), d_hat, numerator


def close(groups: Sequence[GroupStep], totals: Tensor) -> None:
    """End a step: move every group's ``d``, then share them as ``split_groups`` and its mean say.

    Args:
        groups: All groups of the optimiser.
        totals: Their sums (see :meth:`GroupStep.totals`); shape (groups, 2).
    """
    pool = [index for index, group in enumerate(groups) if not group.options.split_groups]
    for group, sums in zip(groups, totals, strict=True):
        if group.adapts and group.options.split_groups:
            group.adapt(sums, group.happens)
    if pool and groups[pool[0]].adapts:
        leader = groups[pool[0]]
        any_happens = torch.stack([groups[index].happens for index in pool]).any()
        leader.adapt(torch.stack([totals[index] for index in pool]).sum(dim=0), any_happens)
    for index in pool[1:]:
        groups[index].follow(groups[pool[0]])

    everyone = [group.numbers for group in groups]
    for numbers in everyone:
        numbers["shared_d"].copy_(numbers["d"])
    sharing = [numbers for numbers in everyone if numbers["split_groups"] and numbers["split_groups_mean"]]
    if len(sharing) > 1:
        mean = harmonic_mean(*(torch.stack([n[name] for n in sharing]) for name in ("d", "weight_sum")))
        for numbers in sharing:
            numbers["shared_d"].copy_(torch.where(numbers["weight_sum"] > 0, mean, numbers["d"]))


def harmonic_mean(d: Tensor, weight_sum: Tensor) -> Tensor:
    """The harmonic mean of ``d`` over the groups that have moved (``weight_sum > 0``); shapes (groups,).

    A group that never had a gradient, or a learning rate, keeps its ``d0`` and would hold the others to it.
    """
    started = weight_sum > 0
    return started.sum() / torch.where(started, 1 / d, 0.0).sum()


def advance_statistics(
    grad: Tensor, p0: Tensor, z: Tensor, s: Tensor, beta3: float, scalars: Scalars
) -> tuple[Tensor, Tensor]:
    """Prodigy's sums of one parameter: moves ``s`` in place, returns ⟨g, p0 − z⟩ and ‖s‖₁.

    ``s ← β3 s + d²/sqrt(d0)·g``. The sums are in float64 over products rounded once, so that they
    hardly depend on how a tensor is cut into shards.

    Args:
        grad, p0, z, s: The sampled elements, shape (samples,); ``p0`` and ``s`` in the storage dtype.
    """
    g = grad.to(scalars.d.dtype)
    product = (p0 - z.to(g.dtype)).mul_(g).sum(dtype=_wide(g))
    moved = (s * beta3).add_(g * scalars.statistic)
    s.copy_(torch.where(scalars.happens, moved, s))
    return product, s.abs().sum(dtype=_wide(g))


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
