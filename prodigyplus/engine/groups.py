"""The numbers of parameter groups in a step: set before anything moves, updated after everything has moved.

Decisions are made by ``torch.where``, so that no step waits for the device. In a group that must not change,
the step runs with the numbers of a no-op (see :class:`prodigyplus.terms.scalars.Scalars`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodigyplus.device import jit
from prodigyplus.device.groups import GroupNumbers, GroupOptions, table_of
from prodigyplus.device.launches import EVIDENCE
from prodigyplus.engine.columns import Columns
from prodigyplus.formulas import balance, prodigy, radam, schedule_free, variants
from prodigyplus.options import Options
from prodigyplus.state import StateOptions
from prodigyplus.terms.scalars import VALUES, Constants, Packed, Scalars
from prodigyplus.torch_private import foreach_copy_


class GroupStep:
    """One parameter group during one step.

    Args:
        index: Its index in ``param_groups``.
        entry: Its entry there; the numbers are views of the columns.

    Attributes:
        skips_per_param: Whether each parameter is skipped individually, instead of all together.
        adapts: Whether its step size adapts; False once ``prodigy_steps`` have passed.
        batch_keys: A cache of its parameters' batch keys, by what they depend on; see ``engine/batches.py``.
    """

    def __init__(self, index: int, entry: dict[str, Any]) -> None:
        self.index = index
        self.entry = entry
        self.options = Options.of(entry)
        self.skips_per_param = False
        self.adapts = not self.options.is_frozen(entry)
        self.batch_keys: dict[Hashable, Hashable | None] = {}
        self._numbers: tuple[Packed, ...]
        self._observed: list[tuple[list[int], Tensor, Tensor]] = []
        self._scalars: dict[tuple[torch.device, torch.dtype], Scalars] = {}

    @functools.cached_property
    def state_options(self) -> StateOptions:
        """Those of its options that determine which state its parameters have."""
        return StateOptions.of(self.options)

    def set_numbers(self, *numbers: Packed) -> None:
        """Set the numbers of this step, in one or more dtypes."""
        self._numbers = numbers
        self._scalars.clear()

    def scalars(self, device: torch.device, dtype: torch.dtype) -> Scalars:
        """The numbers of this step on ``device``, floating-point ones in ``dtype``; cached."""
        key = device, dtype
        if key not in self._scalars:
            numbers = next(
                (given for given in self._numbers if given.values.dtype == dtype), self._numbers[0]
            )
            self._scalars[key] = numbers.to(device, dtype).across(0)
        return self._scalars[key]

    def observe(self, parameters: list[int], products: Tensor, norms: Tensor) -> None:
        """Record the evidence of the parameters with these numbers: products and norms, (count,)."""
        self._observed.append((parameters, products, norms))

    @property
    def evidence_weight(self) -> Tensor:
        """The weight of the products in this step's evidence; 0-dim."""
        return self._numbers[0].across(0).evidence_weight

    @property
    def norm_weight(self) -> Tensor:
        """The weight of the norms in this step's evidence; 0-dim."""
        dlr = self._numbers[0].across(0).dlr
        return dlr if self.options.is_balanced else torch.ones_like(dlr)

    def totals(self, constants: Constants) -> Tensor:
        """The sums of this step over the group: products and norms, not weighted yet; shape (2,)."""
        d: Tensor = self.entry["d"]
        if not self._observed:
            return d.new_zeros(2)
        parameters, *pairs = zip(*self._observed, strict=True)
        # Sum in the order of the parameters, not of arrival: the last bits of a sum depend on its order.
        came = tuple(map(tuple, parameters))
        rows = constants.made(d.device, ("order", came), lambda: _order(came, d.device))
        sums = []
        for values in pairs:
            wide = [value.to(d.device, d.dtype) for value in values]
            whole = torch.cat(wide) if len(wide) > 1 else wide[0]
            sums.append((whole if rows is None else whole.index_select(0, rows)).sum())
        return torch.stack(sums)


# The kernels' numbers for the pools: groups of one pool have one d.
_POOLS = {None: 0, "prodigy": 1, "balance": 2}


def _row(group: GroupStep, *, shares: bool) -> GroupOptions:
    """The options of a group for kernels; ``shares``: whether it moves by the mean of several groups."""
    o = group.options
    return GroupOptions(
        lr=0.0 if isinstance(o.lr, Tensor) else o.lr,
        beta1=o.betas[0],
        beta2=o.betas[1],
        beta3=o.prodigy_beta,
        beta4=o.d_beta,
        d0=o.d0,
        d_coef=o.d_coef,
        limit=prodigy.Estimator.limit_of(o.d_coef),
        speed_coef=prodigy.Estimator.speed_coef_of(o.d_coef),
        warmup_steps=o.warmup_steps,
        schedulefree_c=o.schedulefree_c,
        weight_decay=o.weight_decay,
        eps=o.eps or 0.0,
        use_schedulefree=o.use_schedulefree,
        use_bias_correction=o.use_bias_correction,
        use_adopt=o.use_adopt,
        evidence=EVIDENCE["balance" if o.is_balanced else o.use_speed],
        weight_decay_by_lr=o.weight_decay_by_lr,
        d_limiter=o.d_limiter,
        adapts=group.adapts,
        pool=_POOLS[o.pool],
        shares=shares,
    )


class _Branches(NamedTuple):
    """The options of a group that decide which operators compute its numbers; others are only operands."""

    use_schedulefree: bool
    use_bias_correction: bool
    use_adopt: bool
    use_speed: object
    is_balanced: bool
    weight_decay_by_lr: bool
    d_limiter: bool
    scales_c: bool
    averages_d: bool
    warms_up: bool

    @classmethod
    def of(cls, o: Options) -> _Branches:
        of_step = o.use_schedulefree, o.use_bias_correction, o.use_adopt
        of_d = o.is_balanced, o.weight_decay_by_lr, o.d_limiter
        return cls(*of_step, o.use_speed, *of_d, o.schedulefree_c > 0, o.d_beta > 0, o.warmup_steps > 0)


class _Opened(NamedTuple):
    """Results of :meth:`GroupBatch.open` that :meth:`GroupBatch.commit` needs; shapes (groups,)."""

    weight_sum: Tensor
    effective_lr: Tensor
    valid: Tensor | None  # bool: whether lr is valid; None if the host has checked it


class GroupBatch:
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
        self._rows = None if len(rows) == len(columns) else constants.on(columns.device, rows)

    @classmethod
    def split(cls, groups: Sequence[GroupStep], columns: Columns, constants: Constants) -> list[GroupBatch]:
        """Split ``groups`` into batches of equal branches; the other arguments are those of the class."""
        batches: dict[_Branches, list[GroupStep]] = {}
        for group in groups:
            batches.setdefault(_Branches.of(group.options), []).append(group)
        return [cls(batch, columns, constants) for batch in batches.values()]

    def select(self, values: Tensor) -> Tensor:
        """The values of this batch's groups, from ``values`` of all groups of the optimiser."""
        return values if self._rows is None else values.index_select(0, self._rows)

    def open(self, moves: Tensor) -> _Opened:
        """Set this step's numbers.

        Args:
            moves: Whether each group of the optimiser moves: where False, a no-op. bool, (groups,).

        Returns:
            What :meth:`commit` needs.
        """
        do, moves = self._branches, self.select(moves)
        d, shared_d, k = self._read("d"), self._read("shared_d"), self._read("k")
        step, one = k + 1, torch.ones_like(d)
        beta1, beta2 = one * self._option(lambda o: o.betas[0]), one * self._option(lambda o: o.betas[1])
        lr, valid = self._lr(one)
        moves = _and(moves, valid)
        dlr, unit, rate = shared_d * lr, one, one * lr
        beta3, observes = one * self._option(lambda o: o.prodigy_beta), torch.ones_like(moves)
        if do.is_balanced:
            evidence_weight = 1 / beta1  # the product is β1⟨g, x − z⟩
        else:
            evidence_weight = prodigy.evidence_weight(
                d, self._option(lambda o: o.d0), self._option(lambda o: math.sqrt(o.d0)), do.use_speed
            )
        if do.use_bias_correction:
            rectification, beta2 = radam.rectified(step, beta2)
            dlr, rate = dlr * rectification, rate * rectification
        if do.warms_up:
            warmup = (step.to(d.dtype) / self._option(lambda o: o.warmup_steps)).clamp_(max=1)
            dlr, rate = dlr * warmup, rate * warmup
        if do.use_adopt:
            observes = variants.adopt_observes(step)
            dlr, unit, rate, beta2, evidence_weight = (
                torch.where(observes, value, 0) for value in (dlr, unit, rate, beta2, evidence_weight)
            )
            beta3 = torch.where(observes, beta3, 1)
        weight_sum, c = self._averaging(dlr.square(), beta1)
        y_fraction = schedule_free.y_fraction(beta1, c)
        values = {
            "beta1": beta1,
            "beta2": beta2,
            "beta3": beta3,
            "grad_weight": (1 - beta1) * d * unit,
            "sq_weight": (1 - beta2) * d.square(),
            "evidence_weight": evidence_weight,
            "unit": unit,
            "dlr": dlr,
            "decay": (dlr if do.weight_decay_by_lr else unit) * self._option(lambda o: o.weight_decay),
            "c": c,
            "y_fraction": y_fraction,
            "d": d,
            "eps": one * self._option(lambda o: o.eps or 0.0),
            "ema_weight": step.to(d.dtype) ** -0.75,
            "adopt_clip": step.to(d.dtype) ** 0.25,
        }
        in_order = torch.stack([values[name] for name in VALUES])
        numbers = Packed(in_order, torch.full_like(step, -1), observes, step).where(moves)
        by_group = _by_group(numbers._replace(values=numbers.values.t().contiguous()))
        for group, of_group in zip(self._groups, by_group, strict=True):
            group.set_numbers(of_group)
        return _Opened(weight_sum, rate * y_fraction if do.use_schedulefree else rate, valid)

    def _averaging(self, weight: Tensor, beta1: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the weights of all steps, including this one, in the average x; and c."""
        weight_sum = self._read("weight_sum") + weight
        strength = self._option(lambda o: o.schedulefree_c) if self._branches.scales_c else None
        return weight_sum, schedule_free.averaging_weight(weight, weight_sum, beta1, strength)

    def _lr(self, one: Tensor) -> tuple[float | Tensor, Tensor | None]:
        """The groups' ``lr``; and whether it is valid (bool), or None if the host has checked it."""
        lr = self._option(lambda o: o.lr)
        if not isinstance(lr, Tensor):
            return lr, None
        # The host refuses an invalid lr, but does not know the value of a tensor on a device.
        valid = torch.isfinite(lr * one) & (lr * one >= 0)
        return torch.where(valid, lr, 0.0), valid

    def commit(self, opened: _Opened, moves: Tensor, skips: Tensor, learns: Tensor) -> Tensor:
        """Count the step.

        Args:
            opened: The result of :meth:`open`.
            moves, skips, learns: For each group of the optimiser: whether anything in it moved; whether the
                step was skipped for a gradient that is not finite; and whether its evidence updates ``d``.
                bool, (groups,).

        Returns:
            ``learns`` of this batch, False where ``lr`` is invalid.
        """
        moves, skips, learns = self.select(moves), self.select(skips), self.select(learns)
        if opened.valid is not None:
            skips = skips | (moves & ~opened.valid)
        moves, learns = _and(moves, opened.valid), _and(learns, opened.valid)
        self._write_(moves, weight_sum=opened.weight_sum, effective_lr=opened.effective_lr)
        for name, counts in (("k", moves), ("skipped", skips)):
            self.scatter_(self._columns[name], self._read(name) + counts)
        return learns

    def scatter_(self, target: Tensor, values: Tensor) -> None:
        """Write the ``values`` of this batch's groups into ``target``, of all groups of the optimiser."""
        if self._rows is None:
            target.copy_(values)
        else:
            target.index_copy_(0, self._rows, values)

    def adapt_(self, totals: Tensor, steps: Tensor, learns: Tensor) -> None:
        """Update ``d`` from the sums of the step.

        Args:
            totals: The weighted sums of all groups of the optimiser, products and norms; (groups, 2).
            steps: How many steps have contributed to each group's ``d``; int64, (groups,).
            learns: Which groups to update; bool, (groups,).
        """
        product, norm = self.select(totals).unbind(1)
        if self._branches.is_balanced:
            self._balance_(balance.Averages(product, norm), self.select(steps), self.select(learns))
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

    def _balance_(self, now: balance.Averages, steps: Tensor, learns: Tensor) -> None:
        before = balance.Averages(self._read("d_numerator"), self._read("d_denom"))
        d, rho, averages = balance.next_d(self._read("d"), steps, before, now)
        numerator, denominator = averages
        self._write_(learns, d=d, d_hat=rho, d_numerator=numerator, d_denom=denominator)

    @property
    def _estimator(self) -> prodigy.Estimator:
        return prodigy.Estimator(
            d0=self._option(lambda o: o.d0),
            d_coef=self._option(lambda o: o.d_coef),
            beta3=self._option(lambda o: o.prodigy_beta),
            beta4=self._option(lambda o: o.d_beta) if self._branches.averages_d else None,
            use_speed=self._branches.use_speed,
            limits=self._branches.d_limiter,
            limit=self._option(lambda o: prodigy.Estimator.limit_of(o.d_coef)),
            speed_coef=self._option(lambda o: prodigy.Estimator.speed_coef_of(o.d_coef)),
        )

    def shared_d(self) -> tuple[Tensor, Tensor]:
        """The step sizes in use of this batch, whose groups share one; see ``prodigy.shared_d``."""
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


def _by_group(numbers: Packed) -> list[Packed]:
    """Split the numbers of all groups, of shapes (groups, …), into those of each."""
    return list(map(Packed, *(column.unbind() for column in numbers)))


def _and(condition: Tensor, also: Tensor | None) -> Tensor:
    return condition if also is None else condition & also


def _order(numbers: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """The indices that sort ``numbers``, concatenated; None if they are in order already."""
    every = [number for run in numbers for number in run]
    order = sorted(range(len(every)), key=every.__getitem__)
    if order == list(range(len(order))):
        return None
    return torch.tensor(order, device="cpu").to(device, non_blocking=True)


class Groups:
    """All parameter groups during one step.

    Args:
        entries: ``param_groups``.
        columns: Their numbers.
        constants: The optimiser's.
    """

    def __init__(self, entries: Sequence[dict[str, Any]], columns: Columns, constants: Constants) -> None:
        self.steps = [GroupStep(index, entry) for index, entry in enumerate(entries)]
        self.columns = columns
        self.constants = constants
        self._kernels = self._group_numbers() if self._has_kernels else None

    @property
    def _has_kernels(self) -> bool:
        """Whether kernels update the groups' numbers: if they also move parameters."""
        device, options = self.columns.device, [step.options for step in self.steps]
        if not jit.runs_on(device) or type(self.columns.floats) is not Tensor:
            return False  # fake tensors have no memory
        # With a fused backward pass, open() and commit() happen at different times.
        return any(o.wants_kernels(device) for o in options) and not any(o.fused_back_pass for o in options)

    def _group_numbers(self) -> GroupNumbers:
        columns = self.columns
        sharing = {step.index for step in self._sharing}
        rates = [step.options.lr for step in self.steps]

        def rows() -> list[GroupOptions]:
            return [_row(step, shares=step.index in sharing) for step in self.steps]

        # Equal options are one object, so they compare fast. But an lr on a device must not be compared.
        key: object = [(step.options, step.adapts, step.index in sharing) for step in self.steps]
        if any(isinstance(rate, Tensor) for rate in rates):
            key = rows()
        return GroupNumbers(columns.floats, columns.counts, table_of(key, rows, rates, columns.sent_options))

    def __len__(self) -> int:
        return len(self.steps)

    @functools.cached_property
    def _batches(self) -> list[GroupBatch]:
        return self._split(self.steps)

    def _split(self, steps: Sequence[GroupStep]) -> list[GroupBatch]:
        return GroupBatch.split(steps, self.columns, self.constants)

    def begin(self, square: Tensor, present: Tensor, *, initializes: bool) -> Tensor:
        """Set this step's numbers, and count it, now that it is known whether all gradients are finite.

        Args:
            square: The sum of all gradients' squares, 0-dim; not finite if any gradient is not.
            present: Above 0 where a group has gradients; shape (groups,).
            initializes: Whether a step whose gradients are all zero only makes state.

        Returns:
            Whether the evidence of the step updates each group's ``d``; bool, (groups,).
        """
        if self._kernels is not None:
            forms, learns = self._kernels.begin_(square, present, initializes=initializes)
            for step, *of_group in zip(self.steps, *map(_by_group, forms), strict=True):
                step.set_numbers(*of_group)
            return learns
        finite = square.isfinite()
        counts = finite & (square > 0) if initializes else finite
        moves, skips = counts & (present > 0), ~finite & (present > 0)
        return self.commit(self.open(moves), moves, skips, learns=moves)

    def open(self, moves: Tensor) -> list[_Opened]:
        """Set this step's numbers of all groups; see :meth:`GroupBatch.open`."""
        return [batch.open(moves) for batch in self._batches]

    def commit(self, opened: Sequence[_Opened], moves: Tensor, skips: Tensor, learns: Tensor) -> Tensor:
        """Count the step in all groups; see :meth:`GroupBatch.commit`. ``opened`` is from :meth:`open`."""
        result = torch.empty_like(learns)
        for batch, of_batch in zip(self._batches, opened, strict=True):
            batch.scatter_(result, batch.commit(of_batch, moves, skips, learns))
        return result

    def totals(self) -> Tensor:
        """The sums of this step in each group, see :meth:`GroupStep.totals`; shape (groups, 2)."""
        totals = [step.totals(self.constants) for step in self.steps]
        return torch.stack(totals) if len(totals) > 1 else totals[0].unsqueeze(0)

    def close(self, totals: Tensor, learns: Tensor) -> None:
        """End the step: update every group's ``d``, then the step sizes in use, which groups may share.

        Args:
            totals: The sums of all groups (see :meth:`totals`), completed over ranks; shape (groups, 2).
            learns: Which groups' ``d`` to update; bool, (groups,).
        """
        if self._kernels is not None:
            self._kernels.end_(totals, learns)
            return
        products, norms = totals.unbind(1)
        products = products * torch.stack([step.evidence_weight for step in self.steps])
        if any(step.options.is_balanced for step in self.steps):
            norms = norms * torch.stack([step.norm_weight for step in self.steps])
        totals = torch.stack((products, norms), 1)
        # Groups of one pool have one d: the first of them updates it from the sums of all. It may have made
        # fewer steps than others, or none, if its parameters are frozen.
        leaders, steps = self._leaders, self.columns["k"]
        pools = [[index for index, of in enumerate(leaders) if of == leader] for leader in set(leaders)]
        for pool in sorted(pool for pool in pools if len(pool) > 1):
            rows, first = (self.constants.on(totals.device, indices) for indices in (pool, pool[:1]))
            totals = totals.index_copy(0, first, totals.index_select(0, rows).sum(dim=0, keepdim=True))
            steps = steps.index_copy(0, first, steps.index_select(0, rows).amax(dim=0, keepdim=True))
            learns = learns.index_copy(0, first, learns.index_select(0, rows).any(dim=0, keepdim=True))
        adapting = [step for step in self.steps if step.adapts and leaders[step.index] == step.index]
        for batch in self._split(adapting):
            batch.adapt_(totals, steps, learns)
        if len(set(leaders)) < len(leaders):
            rows = self.constants.on(totals.device, leaders)
            for name in ("d", "d_hat", "d_numerator", "max_d_numerator", "d_denom"):
                self.columns[name].copy_(self.columns[name].index_select(0, rows))
        self._share(learns.any())

    def _share(self, happens: Tensor) -> None:
        """Set the step sizes in use, if the step ``happens`` (bool, 0-dim) and is not skipped."""
        shared, in_mean = self.columns["d"].clone(), self.columns["in_mean"].clone()
        if sharing := self._sharing:
            batch = GroupBatch(sharing, self.columns, self.constants)
            for column, values in zip((shared, in_mean), batch.shared_d(), strict=True):
                batch.scatter_(column, values)
        for name, values in (("shared_d", shared), ("in_mean", in_mean)):
            self.columns[name].copy_(torch.where(happens, values, self.columns[name]))

    @property
    def _leaders(self) -> list[int]:
        """For each group, the index of the first group in its pool; its own index if it is in none."""
        first: dict[str, int] = {}
        return [
            step.index if (pool := step.options.pool) is None else first.setdefault(pool, step.index)
            for step in self.steps
        ]

    @property
    def _sharing(self) -> list[GroupStep]:
        """The groups that move by the mean of several."""
        sharing = [s for s in self.steps if s.options.pool is None and s.options.split_groups_mean]
        return sharing if len(sharing) > 1 else []

    def in_mean_or_nan(self) -> Tensor:
        """``d`` of the groups that count in the mean of several, NaN for the others; (groups,)."""
        sharing = {step.index for step in self._sharing}
        shares = self.constants.on(self.columns.device, [step.index in sharing for step in self.steps])
        return prodigy.in_mean_or_nan(self.columns["d"], self.columns["in_mean"], shares)
