"""Prodigy's step size ``d`` (arXiv 2306.06101, algorithm 4): a group's numbers, and how they move.

The numbers of a group live in its ``param_groups`` entry, as tensors without dimensions on the device
of the parameters. No step reads one back: every decision is a ``torch.where``, and a step that must
change nothing is a step whose numbers are chosen so that it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodigyplus.layout import wide_dtype
from prodigyplus.options import Options
from prodigyplus.scalars import Constants, Packed, Scalars

# How far the limiter lets d grow in one step.
_LIMIT = 2**0.25

# How many times its start a d must be to count in a mean, how many times less than that it may be when it
# joins late, and after how many steps that is.
_LEAST_GROWTH, _NEAR, _EARLY = 10.0, 10.0, 30

# With SPEED, d grows to this power of itself at most; it is below 1.
_SPEED_LIMIT = 0.975

_CPU = torch.device("cpu")


def first_numbers(d0: float) -> dict[str, float | int]:
    """A new group's numbers, each as a plain number; the keys are those of ``param_groups``.

    ===============  =================================================================================
    ``d``            step size of the group
    ``shared_d``     step size that multiplies ``lr``: ``d``, or a mean of several groups' (:func:`shared_d`)
    ``d_hat``        last estimate ``d_numerator / d_denom``, before limiter and ``d_coef``
    ``in_mean``      1 once ``d`` counts in a mean of several groups' (:func:`shared_d`), else 0
    ``d_numerator``  N, the decayed sum of ⟨g, p0 − z⟩, weighted
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
    return {**numbers, "in_mean": 0.0, **zeros, "k": 0, "skipped": 0}


NUMBERS = tuple(first_numbers(1.0))
COUNTS = ("k", "skipped")


def as_number(name: str, value: float | Tensor, device: torch.device = _CPU) -> Tensor:
    """A group's number as a 0-dim tensor on ``device``: int64, or float64 where the device has it."""
    dtype = torch.int64 if name in COUNTS else wide_dtype(device)
    return torch.as_tensor(value, dtype=dtype, device=device)


def lift(group: dict[str, Any], device: torch.device) -> None:
    """Make a group's numbers tensors on ``device``."""
    group.update({name: as_number(name, group[name], device) for name in NUMBERS})


def make_plain(groups: Sequence[dict[str, Any]], names: Iterable[str] = NUMBERS) -> None:
    """Make 0-dim tensors in ``groups`` plain numbers, in place: one wait for the device, not one a number.

    Args:
        groups: Dicts with such tensors, or plain numbers already.
        names: The keys under which they are.
    """
    found = [(group, name) for group in groups for name in names if isinstance(group[name], Tensor)]
    if found:
        values = torch.stack([group[name].double() for group, name in found]).tolist()
        for (group, name), value in zip(found, values, strict=True):
            group[name] = value if group[name].is_floating_point() else int(value)


class GroupStep:
    """One parameter group during one step.

    Args:
        group: The entry of ``param_groups``; its numbers are tensors (see :func:`lift`).
        constants: Those of the optimiser.
    """

    def __init__(self, group: dict[str, Any], constants: Constants) -> None:
        self.numbers = group
        self.constants = constants
        self.options = Options.of(group)
        self.state_options = self.options.of_state
        self.alone = False  # whether each parameter is skipped for itself
        self.adapts = not (group["frozen"] or self.options.freezes(group["calls"]))
        self.learns: Tensor  # bool, 0-dim: whether the step's evidence is to move d
        self._fixed: Packed
        self._observed: list[tuple[list[int], Tensor, Tensor]] = []
        self._scalars: dict[tuple[torch.device, torch.dtype], Scalars] = {}

    def fix(self, numbers: Packed) -> None:
        """Set this step's numbers."""
        self._fixed = numbers
        self._scalars.clear()

    def scalars(self, device: torch.device, dtype: torch.dtype) -> Scalars:
        """The numbers of this step on ``device``, floating ones in ``dtype``."""
        key = device, dtype
        if key not in self._scalars:
            self._scalars[key] = self._fixed.to(device, dtype).across(0)
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
        places = self.constants.on(d.device, sorted(range(len(order)), key=order.__getitem__))
        totals = [
            torch.cat([value.to(d.device, d.dtype) for value in values]).index_select(0, places).sum()
            for values in pairs
        ]
        return torch.stack((totals[0] * self._fixed.across(0).statistic, totals[1]))


class _Branches(NamedTuple):
    """What of a group's options says what is done with its numbers; the others are numbers themselves."""

    use_schedulefree: bool
    use_bias_correction: bool
    use_adopt: bool
    use_speed: object
    weight_decay_by_lr: bool
    d_limiter: bool
    scales_c: bool
    averages_d: bool

    @classmethod
    def of(cls, o: Options) -> _Branches:
        """Those of a group's options."""
        of_step = o.use_schedulefree, o.use_bias_correction, o.use_adopt
        return cls(
            *of_step, o.use_speed, o.weight_decay_by_lr, o.d_limiter, o.schedulefree_c > 0, o.d_beta > 0
        )


class Alike:
    """Groups whose options say to do the same, and differ in numbers only: an operator is for all of them.

    Tensors of numbers have shape (groups,).

    Args:
        groups: The groups.
        places: Theirs among the groups that they are some of.
    """

    def __init__(self, groups: Sequence[GroupStep], places: Sequence[int]) -> None:
        self._groups = groups
        self._places = places
        self._branches = _Branches.of(groups[0].options)  # those of all

    @classmethod
    def split(cls, groups: Sequence[GroupStep]) -> list[Alike]:
        """All ``groups``, in as many as differ in what to do."""
        places: dict[_Branches, list[int]] = {}
        for place, group in enumerate(groups):
            places.setdefault(_Branches.of(group.options), []).append(place)
        return [cls([groups[place] for place in its], its) for its in places.values()]

    def mine(self, values: Tensor) -> Tensor:
        """Of ``values``, one for each of the groups that these are some of, those of these."""
        if len(self._places) == len(values):
            return values
        return values.index_select(0, self._groups[0].constants.on(values.device, self._places))

    def open(self, happens: Tensor) -> None:
        """Fix this step's numbers.

        Args:
            happens: bool: False where this call is to change nothing.
        """
        do, (d, shared_d, weight_sum, k) = self._branches, self._read("d", "shared_d", "weight_sum", "k")
        step = k + 1
        zero, one = torch.zeros_like(d), torch.ones_like(d)
        beta1, beta2 = one * self._option(lambda o: o.betas[0]), one * self._option(lambda o: o.betas[1])
        lr = self._option(lambda o: o.lr)
        # A tensor's value on a device is not known to the host, which refuses what lr cannot be.
        self._valid = None
        if isinstance(lr, Tensor):
            self._valid = torch.isfinite(lr * one) & (lr * one >= 0)
            lr = torch.where(self._valid, lr, 0.0)
        happens = self._where_valid(happens)
        dlr, unit, rate = shared_d * lr, one, one * lr
        beta3, observes = one * self._option(lambda o: o.prodigy_beta), torch.ones_like(happens)
        if do.use_speed is True:
            statistic = d.sqrt() * self._option(lambda o: o.d0)
        else:
            statistic = d.square() / self._option(lambda o: math.sqrt(o.d0))
        if do.use_bias_correction:
            rectification, beta2 = rectified(step, beta2)
            dlr, rate = dlr * rectification, rate * rectification
        if do.use_adopt:
            # The first gradient starts the second moment, and does nothing else.
            observes = step > 1
            dlr, unit, rate, beta2, statistic = (
                torch.where(observes, value, 0) for value in (dlr, unit, rate, beta2, statistic)
            )
            beta3 = torch.where(observes, beta3, 1)
        weight = dlr.square()
        self._weight_sum = weight_sum + weight
        c = torch.where(self._weight_sum > 0, weight / self._weight_sum, zero)
        if do.scales_c:
            c = (c * ((1 - beta1) * self._option(lambda o: o.schedulefree_c))).clamp_(max=1)
        xy = 1 - beta1 * (1 - c)
        self._effective_lr = rate * xy if do.use_schedulefree else rate
        values = {
            "beta1": beta1,
            "beta2": beta2,
            "beta3": beta3,
            "gradient": (1 - beta1) * d * unit,
            "square": (1 - beta2) * d.square(),
            "statistic": statistic,
            "unit": unit,
            "dlr": dlr,
            "decay": (dlr if do.weight_decay_by_lr else unit) * self._option(lambda o: o.weight_decay),
            "c": c,
            "xy": xy,
            "d": d,
            "eps": one * self._option(lambda o: o.eps or 0.0),
            "recent": step.to(d.dtype) ** -0.75,
            "bound": step.to(d.dtype) ** 0.25,
        }
        in_order = torch.stack([values[name] for name in Scalars._fields if name in values])
        fixed = Packed(in_order, torch.full_like(step, -1), observes, step).only_if(happens)
        each = fixed._replace(values=fixed.values.t().contiguous())
        for group, *its in zip(self._groups, *(numbers.unbind() for numbers in each), strict=True):
            group.fix(Packed(*its))

    def commit(self, happens: Tensor, skips: Tensor, adapts: Tensor) -> None:
        """Count the step that :meth:`open` fixed.

        Args:
            happens: bool: whether it moved anything.
            skips: bool: whether it met a gradient that is not finite.
            adapts: bool: whether :meth:`adapt` is to move ``d``.
        """
        skips, happens, adapts = (
            skips if self._valid is None else skips | (happens & ~self._valid),
            self._where_valid(happens),
            self._where_valid(adapts),
        )
        self._write(happens, weight_sum=self._weight_sum, effective_lr=self._effective_lr)
        for name, counts in (("k", happens), ("skipped", skips)):
            torch._foreach_add_([group.numbers[name] for group in self._groups], counts.unbind())
        for group, learns in zip(self._groups, adapts.unbind(), strict=True):
            group.learns = learns

    def _where_valid(self, condition: Tensor) -> Tensor:
        return condition if self._valid is None else condition & self._valid

    def adapt(self, totals: Tensor, learns: Tensor) -> None:
        """Move ``d`` by sums of the step.

        Args:
            totals: See :meth:`GroupStep.totals`; shape (groups, 2).
            learns: bool: where to.
        """
        product, norm = totals.unbind(1)
        d, numerator, largest, d_hat = self._read("d", "d_numerator", "max_d_numerator", "d_hat")
        d, estimate, numerator = self._next_d(d, numerator, largest, product, norm)
        self._write(
            learns,
            d=d,
            d_hat=torch.where(norm > 0, estimate, d_hat),
            d_numerator=numerator,
            max_d_numerator=torch.maximum(numerator, largest),
            d_denom=norm,
        )

    def _next_d(
        self, d: Tensor, numerator: Tensor, largest: Tensor, product: Tensor, norm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of Prodigy's step size.

        Args:
            d, numerator, largest: ``d``, N and the largest N before the step.
            product, norm: The step's sums over a group, numerator and denominator.

        Returns:
            The next ``d``, the estimate that it goes by and the next N. Where the denominator is zero,
            nothing was observed, and ``d`` stays.
        """
        do, before = self._branches, numerator
        d0, d_coef = self._option(lambda o: o.d0), self._option(lambda o: o.d_coef)
        numerator = numerator * self._option(lambda o: o.prodigy_beta)
        # Until progress is made, what is negative would only hold d down.
        numerator = torch.where((d > d0) | (product > 0), numerator + product, numerator)
        if do.use_speed == "relative":
            grows = (numerator >= largest) & (numerator > 0) & (before > 0)
            d_hat = torch.where(grows, d * (numerator / before).sqrt().clamp(max=_LIMIT), d)
            estimate = torch.where(grows, d_hat * self._option(lambda o: o.d_coef**0.125), d)
        else:
            d_hat = numerator / norm
            if do.use_speed:
                estimate = torch.minimum(d_hat * d_coef, d**_SPEED_LIMIT)
            else:
                # Of a d_coef below 1 what it makes is limited: limited before, d would stay where it is.
                limit = d * self._option(lambda o: _LIMIT / min(1.0, o.d_coef))
                estimate = (torch.minimum(d_hat, limit) if do.d_limiter else d_hat) * d_coef
        if do.averages_d:
            d_beta = self._option(lambda o: o.d_beta)
            moved = d * d_beta + estimate.clamp(min=d0) * (1 - d_beta)
        else:
            moved = torch.maximum(d, estimate)
        return torch.where(norm > 0, moved, d), d_hat, numerator

    def _option(self, value: Callable[[Options], float | Tensor]) -> float | Tensor:
        """Something of the options: a number where it is the same in all groups, else one for each."""
        values = [value(group.options) for group in self._groups]
        first = values[0]
        if len(values) == 1 or not any(isinstance(v, Tensor) or v != first for v in values):
            return first
        return _on_device(values, self._groups[0].numbers["d"])

    def _read(self, *names: str) -> tuple[Tensor, ...]:
        return tuple(torch.stack([group.numbers[name] for group in self._groups]) for name in names)

    def _write(self, condition: Tensor, **values: Tensor) -> None:
        """Set numbers, all of one dtype, where ``condition`` (bool) says so."""
        held = [group.numbers[name] for name in values for group in self._groups]
        before = torch.stack(held).view(len(values), -1)
        after = torch.where(condition, torch.stack(list(values.values())), before)
        torch._foreach_copy_(held, after.view(-1).unbind())


def _on_device(values: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """Numbers as one tensor where ``like``, 0-dim, is."""
    # Made on the device: to send them there would wait for it.
    one = torch.ones_like(like)
    return torch.stack([one * v for v in values])


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


def close(groups: Sequence[GroupStep], totals: Tensor) -> None:
    """End a step: move every group's ``d``, then share them as ``split_groups`` and its mean say.

    Args:
        groups: All groups of the optimiser.
        totals: Their sums (see :meth:`GroupStep.totals`); shape (groups, 2).
    """
    sums, learns = list(totals.unbind()), [group.learns for group in groups]
    pool = [place for place, group in enumerate(groups) if not group.options.split_groups]
    if len(pool) > 1:  # the first adapts for all
        sums[pool[0]] = torch.stack([sums[place] for place in pool]).sum(dim=0)
        learns[pool[0]] = torch.stack([learns[place] for place in pool]).any()
    adapting = [
        place
        for place, group in enumerate(groups)
        if group.adapts and (place in pool[:1] or place not in pool)
    ]
    if adapting:
        their_sums, their_learns = (torch.stack([of[place] for place in adapting]) for of in (sums, learns))
        for alike in Alike.split([groups[place] for place in adapting]):
            alike.adapt(alike.mine(their_sums), alike.mine(their_learns))
    numbers = [group.numbers for group in groups]
    if len(pool) > 1:
        followers = [numbers[place] for place in pool[1:]]
        for name in ("d", "d_hat", "d_numerator", "max_d_numerator", "d_denom"):
            _copy(name, [numbers[pool[0]][name]] * len(followers), followers)

    _copy("shared_d", [its["d"] for its in numbers], numbers)
    if sharing := _sharing(groups):
        d, weight_sum, k, in_mean = (
            torch.stack([group.numbers[name] for group in sharing])
            for name in ("d", "weight_sum", "k", "in_mean")
        )
        d0 = _on_device([group.options.d0 for group in sharing], d[0])
        numbers = [group.numbers for group in sharing]
        for name, value in zip(("shared_d", "in_mean"), shared_d(d, d0, weight_sum, k, in_mean), strict=True):
            _copy(name, value.unbind(), numbers)


def _sharing(groups: Sequence[GroupStep]) -> list[GroupStep]:
    """The groups that move by a mean of several."""
    sharing = [group for group in groups if group.options.split_groups and group.options.split_groups_mean]
    return sharing if len(sharing) > 1 else []


def counted(groups: Sequence[GroupStep]) -> Tensor:
    """The step sizes d that count in a mean of several, nan in the place of the others; shape (groups,)."""
    sharing = {id(group) for group in _sharing(groups)}
    d, in_mean = (torch.stack([group.numbers[name] for group in groups]) for name in ("d", "in_mean"))
    shares = groups[0].constants.on(d.device, [id(group) in sharing for group in groups])
    return torch.where((in_mean > 0) & (shares > 0), d, math.nan)


def _copy(name: str, values: Sequence[Tensor], groups: Sequence[dict[str, Any]]) -> None:
    torch._foreach_copy_([group[name] for group in groups], list(values))


def shared_d(d: Tensor, d0: Tensor, weight_sum: Tensor, k: Tensor, in_mean: Tensor) -> tuple[Tensor, Tensor]:
    """The step size in use in groups that share one: the harmonic mean of ``d`` over those with evidence.

    A start is chosen too small, so what has not grown tenfold is no evidence. Groups that start together
    count as soon as they have left ``d0``, and for good if they have grown so within their first steps. What
    comes to that later (a group that has just been added, or whose gradients are noise) joins the others once
    it is near their mean. So what has nothing to learn, is frozen at its start or has just come does not hold
    the others back: it moves by their mean. Where nothing counts, the mean is over all that have moved.

    Args:
        d, d0, weight_sum, k, in_mean: Numbers of the groups (see :func:`first_numbers`); shapes (groups,).

    Returns:
        The mean in every group that has moved, in the others their own ``d``; and the next ``in_mean``.
    """
    moved, counts = weight_sum > 0, in_mean > 0
    is_early = (k == k.max()) & (k <= _EARLY)
    is_near = d * _NEAR >= _harmonic_mean(d, moved & counts)
    counts = moved & (counts | ((d > _LEAST_GROWTH * d0) & (is_early | is_near)))
    over = counts | (moved & is_early & (d > d0))
    over = torch.where(over.any(), over, moved)
    return torch.where(moved, _harmonic_mean(d, over), d), counts.to(d.dtype)


def _harmonic_mean(d: Tensor, of: Tensor) -> Tensor:
    """That of ``d`` where ``of`` (bool) says so; 0 if it does nowhere. 0-dim."""
    total = torch.where(of, 1 / d, 0.0).sum()
    return torch.where(total > 0, of.sum() / total, 0.0)
