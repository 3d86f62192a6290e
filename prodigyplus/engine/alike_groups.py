"""The numbers of parameter groups that the same operators compute, all of them at once.

Decisions are made by ``torch.where``, so that no step waits for the device. In a group that must not change,
the step runs with the numbers of a no-op (see :class:`prodigyplus.terms.step_numbers.StepNumbers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.engine.columns import Columns
from prodigyplus.engine.group_step import GroupStep
from prodigyplus.formulas import balance, prodigy, radam, schedule_free, variants
from prodigyplus.options import EvidenceKind, Options
from prodigyplus.terms.device_constants import Constants
from prodigyplus.terms.step_numbers import VALUES, PackedNumbers
from prodigyplus.torch_private import foreach_copy_


class _Branches(NamedTuple):
    """The options of a group that decide which operators compute its numbers; others are only operands."""

    use_schedulefree: bool
    use_bias_correction: bool
    use_adopt: bool
    evidence: EvidenceKind
    weight_decay_by_lr: bool
    d_limiter: bool
    scales_c: bool
    averages_d: bool
    warms_up: bool

    @classmethod
    def of(cls, o: Options) -> _Branches:
        return cls(
            use_schedulefree=o.use_schedulefree,
            use_bias_correction=o.use_bias_correction,
            use_adopt=o.use_adopt,
            evidence=o.evidence,
            weight_decay_by_lr=o.weight_decay_by_lr,
            d_limiter=o.d_limiter,
            scales_c=o.schedulefree_c > 0,
            averages_d=o.beta4 > 0,
            warms_up=o.warmup_steps > 0,
        )


class Uncounted(NamedTuple):
    """Results of :meth:`AlikeGroups.set_numbers` that :meth:`AlikeGroups.count` needs; shapes (groups,)."""

    weight_sum: Tensor
    effective_lr: Tensor
    lr_is_valid: Tensor | None  # bool; None if the host has checked it
    lr_is_positive: Tensor | None  # bool; None if the host knows it


class AlikeGroups:
    """Groups whose options take the same branches, so that one operator computes the numbers of all.

    Args:
        groups: The groups.
        columns: The numbers of all groups of the optimiser.
        constants: The optimiser's.
    """

    def __init__(self, groups: Sequence[GroupStep], columns: Columns, constants: Constants) -> None:
        self._groups = groups
        self._columns = columns
        self._branches = _Branches.of(groups[0].options)
        rows = [group.index for group in groups]
        self._rows = None if len(rows) == len(columns) else constants.int64(columns.device, rows)

    @classmethod
    def split(cls, groups: Sequence[GroupStep], columns: Columns, constants: Constants) -> list[AlikeGroups]:
        """Split ``groups`` by their branches; the other arguments are those of the class."""
        alike: dict[_Branches, list[GroupStep]] = {}
        for group in groups:
            alike.setdefault(_Branches.of(group.options), []).append(group)
        return [cls(some, columns, constants) for some in alike.values()]

    def select(self, values: Tensor) -> Tensor:
        """The values of these groups, from ``values`` of all groups of the optimiser."""
        return values if self._rows is None else values.index_select(0, self._rows)

    def set_numbers(self, moves: Tensor) -> Uncounted:
        """Set this step's numbers.

        Args:
            moves: Whether each group of the optimiser moves: where False, a no-op. bool, (groups,).

        Returns:
            What :meth:`count` needs.
        """
        branches, moves = self._branches, self.select(moves)
        d, shared_d, k = self._read("d"), self._read("shared_d"), self._read("k")
        step, ones = k + 1, torch.ones_like(d)
        beta1, beta2 = ones * self._option(lambda o: o.betas[0]), ones * self._option(lambda o: o.betas[1])
        beta3 = ones * self._option(lambda o: o.beta3)
        lr, lr_is_valid = self._lr(ones)
        moves = _and(moves, lr_is_valid)
        unit, observes = ones, torch.ones_like(moves)
        evidence_weight = self._evidence_weight(d, beta1)
        dlr, effective_lr, beta2 = self._step_sizes(lr, step, shared_d, beta2)
        if branches.use_adopt:
            observes = variants.adopt_observes(step)
            dlr, unit, effective_lr, beta2, evidence_weight = (
                torch.where(observes, value, 0) for value in (dlr, unit, effective_lr, beta2, evidence_weight)
            )
            beta3 = torch.where(observes, beta3, 1)
        lr_is_positive = None
        if isinstance(lr, Tensor) or lr == 0:  # what does not move shows nothing of a step size
            lr_is_positive = ones * lr > 0
            observes, beta3 = observes & lr_is_positive, torch.where(lr_is_positive, beta3, 1)
            evidence_weight = torch.where(lr_is_positive, evidence_weight, 0)
        weight = dlr.square()
        weight_sum = self._read("weight_sum") + weight
        c, y_fraction = self._averaging(weight, weight_sum, beta1)
        if branches.use_schedulefree:
            effective_lr = effective_lr * y_fraction
        values = {
            "beta1": beta1,
            "beta2": beta2,
            "beta3": beta3,
            "grad_weight": (1 - beta1) * d * unit,
            "sq_weight": (1 - beta2) * d.square(),
            "evidence_weight": evidence_weight,
            "unit": unit,
            "dlr": dlr,
            "decay": (dlr if branches.weight_decay_by_lr else unit) * self._option(lambda o: o.weight_decay),
            "c": c,
            "y_fraction": y_fraction,
            "d": d,
            "eps": ones * self._option(lambda o: o.eps or 0.0),
            "ema_weight": step.to(d.dtype) ** -0.75,
            "adopt_clip": step.to(d.dtype) ** 0.25,
        }
        in_order = torch.stack([values[name] for name in VALUES])
        numbers = PackedNumbers(in_order, torch.full_like(step, -1), observes, step).where(moves)
        of_groups = each_group(numbers._replace(values=numbers.values.t().contiguous()))
        for group, of_group in zip(self._groups, of_groups, strict=True):
            group.set_numbers(of_group)
        return Uncounted(weight_sum, effective_lr, lr_is_valid, lr_is_positive)

    def _evidence_weight(self, d: Tensor, beta1: Tensor) -> Tensor:
        """The weight of this gradient in Prodigy's statistics, or of balance's products."""
        kind = self._branches.evidence
        if kind == "balance":
            return 1 / beta1  # the product is β1⟨g, x − z⟩
        d0, sqrt_d0 = self._option(lambda o: o.d0), self._option(lambda o: math.sqrt(o.d0))
        return prodigy.evidence_weight(d, d0, sqrt_d0, kind)

    def _step_sizes(
        self, lr: float | Tensor, step: Tensor, shared_d: Tensor, beta2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dlr``, and the same without d, with RAdam and warm-up; and β2, which RAdam corrects."""
        dlr, effective_lr = shared_d * lr, torch.ones_like(shared_d) * lr
        if self._branches.use_bias_correction:
            rectification, beta2 = radam.rectified(step, beta2)
            dlr, effective_lr = dlr * rectification, effective_lr * rectification
        if self._branches.warms_up:
            warmup = (step.to(shared_d.dtype) / self._option(lambda o: o.warmup_steps)).clamp_(max=1)
            dlr, effective_lr = dlr * warmup, effective_lr * warmup
        return dlr, effective_lr, beta2

    def _averaging(self, weight: Tensor, weight_sum: Tensor, beta1: Tensor) -> tuple[Tensor, Tensor]:
        """Schedule-Free's c, and the fraction of z's step that y makes.

        Args:
            weight: The weight of this step in the average x.
            weight_sum: The sum of the weights of all steps, including this one.
            beta1: β1.
        """
        strength = self._option(lambda o: o.schedulefree_c) if self._branches.scales_c else None
        c = schedule_free.averaging_weight(weight, weight_sum, beta1, strength)
        return c, schedule_free.y_fraction(beta1, c)

    def _lr(self, ones: Tensor) -> tuple[float | Tensor, Tensor | None]:
        """The groups' ``lr``; and whether it is valid (bool), or None if the host has checked it."""
        lr = self._option(lambda o: o.lr)
        if not isinstance(lr, Tensor):
            return lr, None
        # The host refuses an invalid lr, but does not know the value of a tensor on a device.
        is_valid = torch.isfinite(lr * ones) & (lr * ones >= 0)
        return torch.where(is_valid, lr, 0.0), is_valid

    def count(self, uncounted: Uncounted, moves: Tensor, skips: Tensor, learns: Tensor) -> Tensor:
        """Count the step.

        Args:
            uncounted: The result of :meth:`set_numbers`.
            moves, skips, learns: For each group of the optimiser: whether anything in it moved; whether the
                step was skipped for a gradient that is not finite; and whether its evidence updates ``d``.
                bool, (groups,).

        Returns:
            ``learns`` of these groups, False where ``lr`` is 0 or invalid.
        """
        moves, skips, learns = self.select(moves), self.select(skips), self.select(learns)
        if uncounted.lr_is_valid is not None:
            skips = skips | (moves & ~uncounted.lr_is_valid)
        moves, learns = _and(moves, uncounted.lr_is_valid), _and(learns, uncounted.lr_is_valid)
        self._write_(moves, weight_sum=uncounted.weight_sum, effective_lr=uncounted.effective_lr)
        for name, counts in (("k", moves), ("skipped", skips)):
            self.scatter_(self._columns[name], self._read(name) + counts)
        return _and(learns, uncounted.lr_is_positive)

    def scatter_(self, target: Tensor, values: Tensor) -> None:
        """Write the ``values`` of these groups into ``target``, of all groups of the optimiser."""
        if self._rows is None:
            target.copy_(values)
        else:
            target.index_copy_(0, self._rows, values)

    def adapt_(self, totals: Tensor, steps_made: Tensor, learns: Tensor) -> None:
        """Update ``d`` from the sums of the step.

        Args:
            totals: The weighted sums of all groups of the optimiser, products and norms; (groups, 2).
            steps_made: How many steps have contributed to each group's ``d``; int64, (groups,).
            learns: Which groups to update; bool, (groups,).
        """
        product, norm = self.select(totals).unbind(1)
        if self._branches.evidence == "balance":
            self._balance_(balance.Averages(product, norm), self.select(steps_made), self.select(learns))
            return
        d, d_hat = self._read("d"), self._read("d_hat")
        evidence = prodigy.Evidence(self._read("d_numerator"), self._read("max_d_numerator"), product, norm)
        d, estimate, numerator = prodigy.next_d(d, evidence, self._estimator)
        self._write_(
            self.select(learns),
            d=d,
            d_hat=torch.where(norm > 0, estimate, d_hat),
            d_numerator=numerator,
            max_d_numerator=torch.maximum(numerator, evidence.largest),
            d_denom=norm,
        )

    def _balance_(self, now: balance.Averages, steps_made: Tensor, learns: Tensor) -> None:
        before = balance.Averages(self._read("d_numerator"), self._read("d_denom"))
        d, rho, averages = balance.next_d(self._read("d"), steps_made, before, now)
        numerator, denominator = averages
        self._write_(learns, d=d, d_hat=rho, d_numerator=numerator, d_denom=denominator)

    @property
    def _estimator(self) -> prodigy.Estimator:
        branches = self._branches
        limit = self._option(lambda o: prodigy.Estimator.limit_of(o.d_coef)) if branches.d_limiter else None
        return prodigy.Estimator(
            d0=self._option(lambda o: o.d0),
            d_coef=self._option(lambda o: o.d_coef),
            beta3=self._option(lambda o: o.beta3),
            beta4=self._option(lambda o: o.beta4) if branches.averages_d else None,
            kind=branches.evidence,
            limit=limit,
            speed_coef=self._option(lambda o: prodigy.Estimator.speed_coef_of(o.d_coef)),
        )

    def shared_d(self) -> tuple[Tensor, Tensor]:
        """The step sizes in use of these groups, which share one; see ``prodigy.shared_d``."""
        numbers = (self._read(name) for name in ("weight_sum", "k", "in_mean"))
        return prodigy.shared_d(self._read("d"), self._option(lambda o: o.d0), *numbers)

    def _option(self, value: Callable[[Options], float | Tensor]) -> float | Tensor:
        """``value(options)``: a number if it is the same for all groups, else a tensor of shape (groups,)."""
        values = [value(group.options) for group in self._groups]
        first = values[0]
        if len(values) == 1 or not any(isinstance(v, Tensor) or v != first for v in values):
            return first
        # Made on the device: a copy from the host would synchronise.
        one = torch.ones_like(self._columns["d"][0])
        return torch.stack([one * v for v in values])

    def _read(self, name: str) -> Tensor:
        return self.select(self._columns[name])

    def _write_(self, condition: Tensor, **values: Tensor) -> None:
        """Set columns, all of one dtype, where ``condition`` (bool) holds."""
        before = torch.stack([self._read(name) for name in values])
        after = torch.where(condition, torch.stack(list(values.values())), before)
        if self._rows is None:
            foreach_copy_([self._columns[name] for name in values], after.unbind())
        else:
            for name, value in zip(values, after.unbind(), strict=True):
                self.scatter_(self._columns[name], value)


def each_group(numbers: PackedNumbers) -> list[PackedNumbers]:
    """Split the numbers of all groups, of shapes (groups, …), into those of each."""
    return list(map(PackedNumbers, *(column.unbind() for column in numbers)))


def _and(condition: Tensor, also: Tensor | None) -> Tensor:
    return condition if also is None else condition & also
