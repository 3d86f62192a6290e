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

from prodigyplus import stacks
from prodigyplus.layout import wide_dtype
from prodigyplus.options import Options

# How far the limiter lets d grow in one step.
_LIMIT = 2**0.25

# With SPEED, d grows to this power of itself at most; it is below 1.
_SPEED_LIMIT = 0.975

_CPU = torch.device("cpu")

# Integers as wide as the dtypes of a step's arithmetic.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def first_numbers(d0: float) -> dict[str, float | int]:
    """A new group's numbers, each as a plain number; the keys are those of ``param_groups``.

    ===============  =================================================================================
    ``d``            step size of the group
    ``shared_d``     step size that multiplies ``lr``: ``d``, or the harmonic mean over the groups
    ``d_hat``        last estimate ``d_numerator / d_denom``, before limiter and ``d_coef``
    ``d_numerator``  N of SPEC's step 7, the decayed sum of ⟨g, p0 − z⟩, weighted
    ``max_d_numerator``  the largest N so far
    ``d_denom``      ‖s‖₁ of the last step
    ``weight_sum``   Σ dlr², the Schedule-Free weights so far
    ``effective_lr`` lr·(1 − β1(1 − c)) of the last step, times RAdam's rectification
    ``k``            steps that counted so far
    ``skipped``      steps skipped for an inf or NaN in a gradient
    ===============  =================================================================================
    """
    numbers = dict.fromkeys(("d", "shared_d", "d_hat"), float(d0))
    zeros = dict.fromkeys(("d_numerator", "max_d_numerator", "d_denom", "weight_sum", "effective_lr"), 0.0)
    return {**numbers, **zeros, "k": 0, "skipped": 0}


NUMBERS = tuple(first_numbers(1.0))
COUNTS = ("k", "skipped")


def as_number(name: str, value: float | Tensor, device: torch.device = _CPU) -> Tensor:
    """A group's number as a 0-dim tensor on ``device``: int64, or float64 where the device has it."""
    dtype = torch.int64 if name in COUNTS else wide_dtype(device)
    return torch.as_tensor(value, dtype=dtype, device=device)


def lift(group: dict[str, Any], device: torch.device) -> None:
    """Make a group's numbers tensors on ``device``."""
    group.update({name: as_number(name, group[name], device) for name in NUMBERS})


class Scalars(NamedTuple):
    """The numbers of a group that one step's arithmetic uses: 0-dim tensors, one dtype and device.

    Where the step is not to happen, what keeps something is 1 and what adds to something is 0. Where it may
    happen for some parameters of a stack only, there is one for each, in a shape to be multiplied with it.
    """

    # What keeps something.
    beta1: Tensor  # decay of the first moment, without Schedule-Free
    beta2: Tensor  # decay of the second moment
    beta3: Tensor  # decay of Prodigy's statistics
    # What adds to something.
    gradient: Tensor  # (1 − β1) d, the weight of this g in the first moment
    square: Tensor  # (1 − β2) d², the weight of this g² in the second moment
    statistic: Tensor  # the weight of this gradient in Prodigy's statistics
    unit: Tensor  # 1
    dlr: Tensor  # d·lr
    decay: Tensor  # what weight decay takes off a weight: λ·dlr, or λ
    c: Tensor  # Schedule-Free's averaging weight
    # What is as it is.
    xy: Tensor  # 1 − β1 (1 − c), how much of z's step y makes
    d: Tensor
    eps: Tensor  # 0 for Adam-atan2, which needs none
    recent: Tensor  # k^-¾, the weight of this step in SPEED's average
    bound: Tensor  # k^¼, how large a normalised gradient may be (ADOPT without Schedule-Free)
    # Not of that dtype.
    admits: Tensor  # an integer as wide as the others: all its bits if this step changes anything, or none
    observes: Tensor  # bool: whether Prodigy counts this gradient
    step: Tensor  # int64: number of this step, from 1

    packed: Packed  # all of them

    def only_if(self, condition: Tensor) -> Scalars:
        """These, if ``condition`` (bool, 0-dim or (count,)) holds as well; else those of no step."""
        return self.packed.only_if(condition).across(0)

    def across(self, dims: int) -> Scalars:
        """These in shapes to be multiplied with a stack of tensors of so many dimensions."""
        return self.packed.across(dims) if self.unit.ndim else self

    def admit(self, values: Tensor) -> Tensor:
        """``values``, or zeros if the step is not to happen; a new tensor. Keeps 0·inf out of what follows.

        Args:
            values: Of the dtype of the numbers.
        """
        # By their bits: to choose, with torch.where(), takes four times as long on a CPU.
        return (values.view(self.admits.dtype) & self.admits).view(values.dtype)

    def admit_(self, values: Tensor) -> Tensor:
        """:meth:`admit`, in place."""
        values.view(self.admits.dtype).bitwise_and_(self.admits)
        return values


# Where among them those that add something begin, and those that are as they are.
_ADDS, _STAYS = map(Scalars._fields.index, ("gradient", "xy"))


class Packed(NamedTuple):
    """:class:`Scalars` in few tensors, in which a compiled pass takes them."""

    values: Tensor  # shape (numbers,), or (numbers, count) where parameters of a stack have their own
    admits: Tensor
    observes: Tensor
    step: Tensor

    def only_if(self, condition: Tensor) -> Packed:
        """See :meth:`Scalars.only_if`."""
        values = self.values
        if values.ndim <= condition.ndim:
            values = values.unsqueeze(1).expand(-1, len(condition))
        kept, added, others = values.tensor_split((_ADDS, _STAYS))
        return Packed(
            torch.cat((torch.where(condition, kept, 1), torch.where(condition, added, 0), others)),
            torch.where(condition, self.admits, 0),
            self.observes & condition,
            self.step,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Packed:
        """These on another device, in another dtype."""
        admits = self.admits.to(device, _BITS[dtype])
        return Packed(self.values.to(device, dtype), admits, self.observes.to(device), self.step.to(device))

    def across(self, dims: int) -> Scalars:
        """These one by one, in shapes to be multiplied with a stack of tensors of so many dimensions."""
        if self.values.ndim == 1:
            return Scalars._make((*self.values.unbind(), self.admits, self.observes, self.step, self))
        shape = -1, *(1,) * dims
        values = self.values.view(len(self.values), *shape).unbind()
        return Scalars._make((*values, self.admits.view(shape), self.observes.view(shape), self.step, self))


class GroupStep:
    """One parameter group during one step.

    Args:
        group: The entry of ``param_groups``; its numbers are tensors (see :func:`lift`).
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self.numbers = group
        self.options = Options.of(group)
        self.alone = False  # whether each parameter is skipped for itself
        self.adapts = self.options.adapts(group["calls"])
        self._observed: list[tuple[list[int], Tensor, Tensor]] = []
        self._scalars: dict[tuple[torch.device, torch.dtype], Scalars] = {}

    def open(self, happens: Tensor) -> None:
        """Fix this step's numbers.

        Args:
            happens: bool, 0-dim: False if this call is to change nothing.
        """
        o, numbers = self.options, self.numbers
        d, step = numbers["d"], numbers["k"] + 1
        zero, one = torch.zeros_like(d), torch.ones_like(d)
        beta1, beta2 = one * o.betas[0], one * o.betas[1]
        dlr, unit = numbers["shared_d"] * o.lr, one
        rate = one * o.lr
        beta3, observes = one * o.prodigy_beta, torch.ones_like(happens)
        statistic = d.sqrt() * o.d0 if o.use_speed is True else d.square() / math.sqrt(o.d0)
        if o.use_bias_correction:
            rectification, beta2 = rectified(step, beta2)
            dlr, rate = dlr * rectification, rate * rectification
        if o.use_adopt:
            # The first gradient starts the second moment, and does nothing else.
            observes = step > 1
            dlr, unit, rate, beta2, statistic = (
                torch.where(observes, value, 0) for value in (dlr, unit, rate, beta2, statistic)
            )
            beta3 = torch.where(observes, beta3, 1)
        weight = dlr.square()
        self._weight_sum = numbers["weight_sum"] + weight
        c = torch.where(self._weight_sum > 0, weight / self._weight_sum, zero)
        if o.schedulefree_c > 0:
            c = (c * ((1 - beta1) * o.schedulefree_c)).clamp_(max=1)
        xy = 1 - beta1 * (1 - c)
        self._effective_lr = rate * xy if o.use_schedulefree else rate
        values = {
            "beta1": beta1,
            "beta2": beta2,
            "beta3": beta3,
            "gradient": (1 - beta1) * d * unit,
            "square": (1 - beta2) * d.square(),
            "statistic": statistic,
            "unit": unit,
            "dlr": dlr,
            "decay": o.weight_decay * (dlr if o.weight_decay_by_lr else unit),
            "c": c,
            "xy": xy,
            "d": d,
            "eps": one * (o.eps or 0.0),
            "recent": step.to(d.dtype) ** -0.75,
            "bound": step.to(d.dtype) ** 0.25,
        }
        in_order = torch.stack([values[name] for name in Scalars._fields if name in values])
        self._exact = Packed(in_order, torch.full_like(step, -1), observes, step).only_if(happens)
        self._scalars.clear()

    def commit(self, happens: Tensor, skips: Tensor, adapts: Tensor) -> None:
        """Count the step that :meth:`open` fixed.

        Args:
            happens: bool, 0-dim: whether it moved anything.
            skips: bool, 0-dim: whether it met a gradient that is not finite.
            adapts: bool, 0-dim: whether :meth:`adapt` is to move ``d``.
        """
        numbers = self.numbers
        for name, value in (("weight_sum", self._weight_sum), ("effective_lr", self._effective_lr)):
            numbers[name].copy_(torch.where(happens, value, numbers[name]))
        numbers["k"].add_(happens)
        numbers["skipped"].add_(skips)
        self.learns = adapts

    def scalars(self, device: torch.device, dtype: torch.dtype) -> Scalars:
        """The numbers of this step on ``device``, floating ones in ``dtype``."""
        key = device, dtype
        if key not in self._scalars:
            self._scalars[key] = self._exact.to(device, dtype).across(0)
        return self._scalars[key]

    def observe(self, numbers: list[int], products: Tensor, norms: Tensor) -> None:
        """Take in the evidence of parameters: their products and norms, (count,) (see ``progress.py``)."""
        self._observed.append((numbers, products, norms))

    def totals(self) -> Tensor:
        """The group's sums of this step: numerator (weighted) and denominator, as a tensor of two."""
        d: Tensor = self.numbers["d"]
        if not self._observed:
            return d.new_zeros(2)
        numbers, *pairs = zip(*self._observed, strict=True)
        order = [number for of_part in numbers for number in of_part]
        # In the order of the parameters, in whichever they came: a sum has the bits of its order.
        places = stacks.constants(tuple(sorted(range(len(order)), key=order.__getitem__)), d.device)
        totals = [
            torch.cat([value.to(d.device, d.dtype) for value in values]).index_select(0, places).sum()
            for values in pairs
        ]
        return torch.stack((totals[0] * self._exact.across(0).statistic, totals[1]))

    def adapt(self, totals: Tensor, learns: Tensor) -> None:
        """Move ``d`` by sums of the step (see :meth:`totals`), where ``learns`` (bool, 0-dim) says so."""
        numbers = self.numbers
        d, d_hat, numerator = next_d(
            numbers["d"], numbers["d_numerator"], numbers["max_d_numerator"], totals, self.options
        )
        moved = {
            "d": d,
            "d_hat": torch.where(totals[1] > 0, d_hat, numbers["d_hat"]),
            "d_numerator": numerator,
            "max_d_numerator": torch.maximum(numerator, numbers["max_d_numerator"]),
            "d_denom": totals[1],
        }
        for name, value in moved.items():
            numbers[name].copy_(torch.where(learns, value, numbers[name]))

    def follow(self, leader: GroupStep) -> None:
        """Take over the step size of a group that adapts for both."""
        for name in ("d", "d_hat", "d_numerator", "max_d_numerator", "d_denom"):
            self.numbers[name].copy_(leader.numbers[name])


def rectified(step: Tensor, beta2: Tensor) -> tuple[Tensor, Tensor]:
    """RAdam (arXiv 1908.03265, algorithm 2): how much of a step to make, and the β2 that corrects the bias.

    Args:
        step: Its number, from 1; 0-dim.
        beta2: Decay of the second moment, above 0.6; 0-dim.

    Returns:
        The rectification, 0 as long as the average is too short to be trusted; and the decay with which
        ``V ← β2' V + (1−β2') g²`` is the average without its bias to zero.
    """
    decayed = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * decayed / (1 - decayed)
    variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return torch.where(length > 4, variance.sqrt(), 0.0), 1 - (1 - beta2) / (1 - decayed)


def next_d(
    d: Tensor, numerator: Tensor, largest: Tensor, totals: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Prodigy's step size.

    Args:
        d, numerator, largest: ``d``, N and the largest N before the step; 0-dim.
        totals: The step's sums over the group, numerator and denominator; shape (2,).
        options: Those of the group.

    Returns:
        The next ``d``, the estimate that it goes by and the next N; 0-dim. Where the denominator is zero,
        nothing was observed, and ``d`` stays.
    """
    before = numerator
    product, norm = totals.unbind()
    numerator = options.prodigy_beta * numerator
    # Until progress is made, what is negative would only hold d down.
    numerator = torch.where((d > options.d0) | (product > 0), numerator + product, numerator)
    if options.use_speed == "relative":
        grows = (numerator >= largest) & (numerator > 0) & (before > 0)
        d_hat = torch.where(grows, d * (numerator / before).sqrt().clamp(max=_LIMIT), d)
        estimate = torch.where(grows, options.d_coef**0.125 * d_hat, d)
    else:
        d_hat = numerator / norm
        if options.use_speed:
            estimate = torch.minimum(options.d_coef * d_hat, d**_SPEED_LIMIT)
        else:
            # Of a d_coef below 1 what it makes is limited: limited before, d would stay where it is.
            limit = _LIMIT / min(1.0, options.d_coef) * d
            estimate = options.d_coef * (torch.minimum(d_hat, limit) if options.d_limiter else d_hat)
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
            group.adapt(sums, group.learns)
    if pool and groups[pool[0]].adapts:
        leader = groups[pool[0]]
        learns = torch.stack([groups[index].learns for index in pool]).any()
        leader.adapt(torch.stack([totals[index] for index in pool]).sum(dim=0), learns)
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
