"""What a step does to the numbers of parameter groups: before anything moves, and after everything has.

A decision about a number is a ``torch.where``, so that no step waits for the device. A group's step that must
change nothing is a step with other numbers (see :class:`prodigyplus.terms.scalars.Scalars`).
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
        skips_per_param: Whether each parameter is skipped for itself, rather than all together.
        adapts: Whether its step size does; not once ``prodigy_steps`` has passed.
        batch_keys: Those of its parameters, by what they hang on; see ``engine/batches.py``.
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
        """Those of its options that say what state there is."""
        return StateOptions.of(self.options)

    def set_numbers(self, *numbers: Packed) -> None:
        """Set this step's numbers; they may be given in several dtypes."""
        self._numbers = numbers
        self._scalars.clear()

    def scalars(self, device: torch.device, dtype: torch.dtype) -> Scalars:
        """The numbers of this step on ``device``, floating ones in ``dtype``."""
        key = device, dtype
        if key not in self._scalars:
            numbers = next(
                (given for given in self._numbers if given.values.dtype == dtype), self._numbers[0]
            )
            self._scalars[key] = numbers.to(device, dtype).across(0)
        return self._scalars[key]

    def observe(self, parameters: list[int], products: Tensor, norms: Tensor) -> None:
        """Take in the evidence of parameters, by their numbers: products and norms, (count,)."""
        self._observed.append((parameters, products, norms))

    @property
    def prodigy_weight(self) -> Tensor:
        """What multiplies the products of this step's evidence; 0-dim."""
        return self._numbers[0].across(0).prodigy_weight

    @property
    def norm_weight(self) -> Tensor:
        """What multiplies the norms of this step's evidence; 0-dim."""
        dlr = self._numbers[0].across(0).dlr
        return dlr if self.options.is_balanced else torch.ones_like(dlr)

    def totals(self, constants: Constants) -> Tensor:
        """The group's sums of this step, of products and of norms, as a tensor of two."""
        d: Tensor = self.entry["d"]
        if not self._observed:
            return d.new_zeros(2)
        parameters, *pairs = zip(*self._observed, strict=True)
        # In the order of the parameters, in whichever they came: a sum has the bits of its order.
        came = tuple(map(tuple, parameters))
        rows = constants.made(d.device, ("order", came), lambda: _order(came, d.device))
        sums = []
        for values in pairs:
            wide = [value.to(d.device, d.dtype) for value in values]
            whole = torch.cat(wide) if len(wide) > 1 else wide[0]
            sums.append((whole if rows is None else whole.index_select(0, rows)).sum())
        return torch.stack(sums)


# The pools of groups, as the kernels number them.
_POOLS = {None: 0, "prodigy": 1, "balance": 2}


def _row(group: GroupStep, *, shares: bool) -> GroupOptions:
    """The options of a group for kernels; ``shares``: whether it moves by a mean of several."""
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
    """The options of a group that decide which operators its numbers need; others are operands."""

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
    """What opening the step of a batch of groups has found, for its end; shapes (groups,)."""

    weight_sum: Tensor
    effective_lr: Tensor
    valid: Tensor | None  # bool: where lr is a number that can be; None where the host has seen that it is


class GroupBatch:
    """Groups whose options take the same branches, so that one operator serves all.

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
        """All ``groups``, in as many batches as there are branches; the other arguments as for the class."""
        batches: dict[_Branches, list[GroupStep]] = {}
        for group in groups:
            batches.setdefault(_Branches.of(group.options), []).append(group)
        return [cls(batch, columns, constants) for batch in batches.values()]

    def select(self, values: Tensor) -> Tensor:
        """Those of this batch's groups, of ``values`` that has one for each group of the optimiser."""
        return values if self._rows is None else values.index_select(0, self._rows)

    def open(self, moves: Tensor) -> _Opened:
        """Set this step's numbers.

        Args:
            moves: bool, for all groups: False where this call is to change nothing.
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
            prodigy_weight = 1 / beta1  # of β1⟨g, x − z⟩
        else:
            prodigy_weight = prodigy.evidence_weight(
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
            dlr, unit, rate, beta2, prodigy_weight = (
                torch.where(observes, value, 0) for value in (dlr, unit, rate, beta2, prodigy_weight)
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
            "prodigy_weight": prodigy_weight,
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
        """The sum of the steps' weights in the average, this one's included, and Schedule-Free's c."""
        weight_sum = self._read("weight_sum") + weight
        strength = self._option(lambda o: o.schedulefree_c) if self._branches.scales_c else None
        return weight_sum, schedule_free.averaging_weight(weight, weight_sum, beta1, strength)

    def _lr(self, one: Tensor) -> tuple[float | Tensor, Tensor | None]:
        """The groups' ``lr``, and where it is a number that can be, if the host does not know it."""
        lr = self._option(lambda o: o.lr)
        if not isinstance(lr, Tensor):
            return lr, None
        # A tensor's value on a device is not known to the host, which refuses what lr cannot be.
        valid = torch.isfinite(lr * one) & (lr * one >= 0)
        return torch.where(valid, lr, 0.0), valid

    def commit(self, opened: _Opened, moves: Tensor, skips: Tensor, learns: Tensor) -> Tensor:
        """Count the step.

        Args:
            opened: What :meth:`open` gave.
            moves, skips, learns: bool, for all groups: whether it moved anything; whether it met a gradient
                that is not finite; and whether its evidence is to move ``d``.

        Returns:
            ``learns`` of this batch, False where ``lr`` cannot be.
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
        """Write this batch's ``values`` into ``target``, which has one for each group of the optimiser."""
        if self._rows is None:
            target.copy_(values)
        else:
            target.index_copy_(0, self._rows, values)

    def adapt_(self, totals: Tensor, learns: Tensor) -> None:
        """Move ``d`` by the sums of the step.

        Args:
            totals: See :meth:`GroupStep.totals`; for all groups, shape (groups, 2).
            learns: bool, for all groups: where to.
        """
        product, norm = self.select(totals).unbind(1)
        if self._branches.is_balanced:
            self._balance_(balance.Averages(product, norm), self.select(learns))
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

    def _balance_(self, now: balance.Averages, learns: Tensor) -> None:
        before = balance.Averages(self._read("d_numerator"), self._read("d_denom"))
        d, rho, averages = balance.next_d(self._read("d"), self._read("k"), before, now)
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
        """The harmonic mean of those with evidence, for each of this batch; see the function of that name."""
        numbers = (self._read(name) for name in ("weight_sum", "k", "in_mean"))
        return prodigy.shared_d(self._read("d"), self._option(lambda o: o.d0), *numbers)

    def _option(self, value: Callable[[Options], float | Tensor]) -> float | Tensor:
        """Something of the options: a number where it is the same in all groups, else one for each."""
        values = [value(group.options) for group in self._groups]
        first = values[0]
        if len(values) == 1 or not any(isinstance(v, Tensor) or v != first for v in values):
            return first
        # Made on the device: to send them there would wait for it.
        one = torch.ones_like(self._columns["d"][0])
        return torch.stack([one * v for v in values])

    def _read(self, name: str) -> Tensor:
        return self.select(self._columns[name])

    def _write_(self, condition: Tensor, **values: Tensor) -> None:
        """Set numbers, all of one dtype, where ``condition`` (bool) holds."""
        before = torch.stack([self._read(name) for name in values])
        after = torch.where(condition, torch.stack(list(values.values())), before)
        if self._rows is None:
            foreach_copy_([self._columns[name] for name in values], after.unbind())
        else:
            for name, value in zip(values, after.unbind(), strict=True):
                self.scatter_(self._columns[name], value)


def _by_group(numbers: Packed) -> list[Packed]:
    """The numbers of each group, from those of all, of shapes (groups, …)."""
    return list(map(Packed, *(column.unbind() for column in numbers)))


def _and(condition: Tensor, also: Tensor | None) -> Tensor:
    return condition if also is None else condition & also


def _order(numbers: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """The places of numbers, several runs of them, in their order; None where they are in order."""
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
        self._kernels = self._in_kernels() if self._has_kernels else None

    @property
    def _has_kernels(self) -> bool:
        """Whether kernels move the groups' numbers: where they move parameters too."""
        device, options = self.columns.device, [step.options for step in self.steps]
        if not jit.runs_on(device) or type(self.columns.floats) is not Tensor:
            return False  # or fake ones, which have no memory
        # Within the backward pass, the numbers are set at one time and counted at another.
        return any(o.wants_kernels(device) for o in options) and not any(o.fused_back_pass for o in options)

    def _in_kernels(self) -> GroupNumbers:
        columns = self.columns
        sharing = {step.index for step in self._sharing}
        rates = [step.options.lr for step in self.steps]

        def rows() -> list[GroupOptions]:
            return [_row(step, shares=step.index in sharing) for step in self.steps]

        # Equal options are one object, so that they are soon compared; a rate on a device had better not be.
        key: object = [(step.options, step.adapts, step.index in sharing) for step in self.steps]
        if any(isinstance(rate, Tensor) for rate in rates):
            key = rows()
        return GroupNumbers(columns.floats, columns.counts, table_of(key, rows, rates, columns.options))

    def __len__(self) -> int:
        return len(self.steps)

    @functools.cached_property
    def _batches(self) -> list[GroupBatch]:
        return self._split(self.steps)

    def _split(self, steps: Sequence[GroupStep]) -> list[GroupBatch]:
        return GroupBatch.split(steps, self.columns, self.constants)

    def begin(self, square: Tensor, present: Tensor, *, initializes: bool) -> Tensor:
        """Set this step's numbers, and count it, once it is known of all gradients whether they are finite.

        Args:
            square: The sum of all gradients' squares, 0-dim; not finite if one of their elements is not.
            present: More than 0 where a group has gradients; shape (groups,).
            initializes: Whether the step only makes state, if all gradients are zero.

        Returns:
            bool, (groups,): whether the evidence of the step is to move ``d``.
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
        """Set this step's numbers of all groups; ``moves`` as for :meth:`GroupBatch.open`."""
        return [batch.open(moves) for batch in self._batches]

    def commit(self, opened: Sequence[_Opened], moves: Tensor, skips: Tensor, learns: Tensor) -> Tensor:
        """Count the step of all groups; as :meth:`GroupBatch.commit`, with what :meth:`open` gave."""
        result = torch.empty_like(learns)
        for batch, of_batch in zip(self._batches, opened, strict=True):
            batch.scatter_(result, batch.commit(of_batch, moves, skips, learns))
        return result

    def totals(self) -> Tensor:
        """The sums of this step, of each group; shape (groups, 2)."""
        totals = [step.totals(self.constants) for step in self.steps]
        return torch.stack(totals) if len(totals) > 1 else totals[0].unsqueeze(0)

    def close(self, totals: Tensor, learns: Tensor) -> None:
        """End the step: move every group's ``d``, then share them as ``split_groups`` and its mean say.

        Args:
            totals: The sums of all groups (see :meth:`totals`), whole; shape (groups, 2).
            learns: bool: where they are to move ``d``; shape (groups,).
        """
        if self._kernels is not None:
            self._kernels.end_(totals, learns)
            return
        products, norms = totals.unbind(1)
        products = products * torch.stack([step.prodigy_weight for step in self.steps])
        if any(step.options.is_balanced for step in self.steps):
            norms = norms * torch.stack([step.norm_weight for step in self.steps])
        totals = torch.stack((products, norms), 1)
        # Groups of one pool have one d: the first of them adapts, by the sums of all.
        leaders = self._leaders
        pools = [[index for index, of in enumerate(leaders) if of == leader] for leader in set(leaders)]
        for pool in sorted(pool for pool in pools if len(pool) > 1):
            rows, first = (self.constants.on(totals.device, indices) for indices in (pool, pool[:1]))
            totals = totals.index_copy(0, first, totals.index_select(0, rows).sum(dim=0, keepdim=True))
            learns = learns.index_copy(0, first, learns.index_select(0, rows).any(dim=0, keepdim=True))
        adapting = [step for step in self.steps if step.adapts and leaders[step.index] == step.index]
        for batch in self._split(adapting):
            batch.adapt_(totals, learns)
        if len(set(leaders)) < len(leaders):
            rows = self.constants.on(totals.device, leaders)
            for name in ("d", "d_hat", "d_numerator", "max_d_numerator", "d_denom"):
                self.columns[name].copy_(self.columns[name].index_select(0, rows))
        self._share(learns.any())

    def _share(self, happens: Tensor) -> None:
        """Set the step sizes in use, where the step ``happens`` (bool, 0-dim); a skipped one changes none."""
        shared, in_mean = self.columns["d"].clone(), self.columns["in_mean"].clone()
        if sharing := self._sharing:
            batch = GroupBatch(sharing, self.columns, self.constants)
            for column, values in zip((shared, in_mean), batch.shared_d(), strict=True):
                batch.scatter_(column, values)
        for name, values in (("shared_d", shared), ("in_mean", in_mean)):
            self.columns[name].copy_(torch.where(happens, values, self.columns[name]))

    @property
    def _leaders(self) -> list[int]:
        """Of each group, the first of its pool; of one that is in none, itself."""
        first: dict[str, int] = {}
        return [
            step.index if (pool := step.options.pool) is None else first.setdefault(pool, step.index)
            for step in self.steps
        ]

    @property
    def _sharing(self) -> list[GroupStep]:
        """The groups that move by a mean of several."""
        sharing = [s for s in self.steps if s.options.pool is None and s.options.split_groups_mean]
        return sharing if len(sharing) > 1 else []

    def in_mean_or_nan(self) -> Tensor:
        """The step sizes that count in a mean of several, nan in the place of the others; (groups,)."""
        sharing = {step.index for step in self._sharing}
        shares = self.constants.on(self.columns.device, [step.index in sharing for step in self.steps])
        return prodigy.in_mean_or_nan(self.columns["d"], self.columns["in_mean"], shares)
