"""The numbers of parameter groups in a step: set before anything moves, updated after everything has moved.

Kernels compute them if they also move parameters (:mod:`prodigyplus.device.group_launches`); otherwise
operators do (:mod:`prodigyplus.engine.alike_groups`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prodigyplus.device import jit
from prodigyplus.device.group_launches import GroupLaunches, table_of
from prodigyplus.device.tables import EVIDENCE_KINDS, POOLS, GroupOptions
from prodigyplus.engine.alike_groups import AlikeGroups, Uncounted, each_group
from prodigyplus.engine.columns import Columns
from prodigyplus.engine.group_step import GroupStep
from prodigyplus.formulas import prodigy
from prodigyplus.terms.device_constants import Constants


def _row(group: GroupStep, *, shares: bool) -> GroupOptions:
    """The options of a group for kernels; ``shares``: whether it moves by the mean of several groups."""
    o = group.options
    return GroupOptions(
        lr=0.0 if isinstance(o.lr, Tensor) else o.lr,
        beta1=o.betas[0],
        beta2=o.betas[1],
        beta3=o.beta3,
        beta4=o.beta4,
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
        evidence=EVIDENCE_KINDS[o.evidence],
        weight_decay_by_lr=o.weight_decay_by_lr,
        d_limiter=o.d_limiter,
        adapts=group.adapts,
        pool=POOLS[o.pool],
        shares=shares,
    )


class Groups:
    """All parameter groups during one step.

    Args:
        param_groups: The optimiser's ``param_groups``.
        columns: The numbers of the groups.
        constants: The optimiser's cache of constants.
    """

    def __init__(
        self, param_groups: Sequence[dict[str, Any]], columns: Columns, constants: Constants
    ) -> None:
        self.group_steps = [GroupStep(index, group, constants) for index, group in enumerate(param_groups)]
        self.columns = columns
        self.constants = constants
        self._kernels = self._launches_of_groups() if self._has_kernels else None

    @property
    def _has_kernels(self) -> bool:
        """Whether kernels update the groups' numbers: if they also move parameters."""
        device, options = self.columns.device, [group.options for group in self.group_steps]
        if not jit.runs_on(device) or type(self.columns.floats) is not Tensor:
            return False  # fake tensors have no memory
        # With a fused backward pass, set_numbers() and count() happen at different times.
        return any(o.wants_kernels(device) for o in options) and not any(o.fused_back_pass for o in options)

    def _launches_of_groups(self) -> GroupLaunches:
        columns = self.columns
        sharing = {group.index for group in self.sharing}
        lrs = [group.options.lr for group in self.group_steps]

        def rows() -> list[GroupOptions]:
            return [_row(group, shares=group.index in sharing) for group in self.group_steps]

        # Equal options are one object, so they compare fast. But an lr on a device must not be compared.
        key: object = [(group.options, group.adapts, group.index in sharing) for group in self.group_steps]
        if any(isinstance(lr, Tensor) for lr in lrs):
            key = rows()
        return GroupLaunches(columns.floats, columns.counts, table_of(key, rows, lrs, columns.sent_options))

    def last_step_sizes(self) -> Tensor:
        """The step sizes that the groups used in their last steps; float32, (groups,)."""
        return (self.columns["shared_d"] * self.columns["effective_lr"]).float()

    @functools.cached_property
    def _alike(self) -> list[AlikeGroups]:
        return self._split(self.group_steps)

    def _split(self, groups: Sequence[GroupStep]) -> list[AlikeGroups]:
        return AlikeGroups.split(groups, self.columns, self.constants)

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
            for group, *numbers in zip(self.group_steps, *map(each_group, forms), strict=True):
                group.set_numbers(*numbers)
            return learns
        finite = square.isfinite()
        counts = finite & (square > 0) if initializes else finite
        moves, skips = counts & (present > 0), ~finite & (present > 0)
        return self.count(self.set_numbers(moves), moves, skips, learns=moves)

    def set_numbers(self, moves: Tensor) -> list[Uncounted]:
        """Set this step's numbers of all groups; see :meth:`AlikeGroups.set_numbers`."""
        return [alike.set_numbers(moves) for alike in self._alike]

    def count(self, uncounted: Sequence[Uncounted], moves: Tensor, skips: Tensor, learns: Tensor) -> Tensor:
        """Count the step in all groups, whose numbers are set; see :meth:`AlikeGroups.count`."""
        result = torch.empty_like(learns)
        for alike, of_alike in zip(self._alike, uncounted, strict=True):
            alike.scatter_(result, alike.count(of_alike, moves, skips, learns))
        return result

    def totals(self) -> Tensor:
        """The sums of this step in each group, see :meth:`GroupStep.totals`; shape (groups, 2)."""
        totals = [group.totals() for group in self.group_steps]
        return torch.stack(totals) if len(totals) > 1 else totals[0].unsqueeze(0)

    def end(self, totals: Tensor, learns: Tensor) -> None:
        """End the step: update every group's ``d``, then the step sizes in use, which groups may share.

        Args:
            totals: The sums of all groups (see :meth:`totals`), completed over ranks; shape (groups, 2).
            learns: Which groups' ``d`` to update; bool, (groups,).
        """
        if self._kernels is not None:
            self._kernels.end_(totals, learns)
            return
        weights = torch.stack([weight for group in self.group_steps for weight in group.evidence_weights])
        totals, steps_made, learns = self._pooled(totals * weights.view_as(totals), learns)
        leads = [g for g in self.group_steps if g.adapts and self._leaders[g.index] == g.index]
        for alike in self._split(leads):
            alike.adapt_(totals, steps_made, learns)
        self._follow_leaders_()
        self._share_(learns.any())

    def _pooled(self, totals: Tensor, learns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``totals``, the steps that groups have made, and ``learns``: a pool's are those of its leader.

        Groups of one pool have one d, which the first of them updates from the sums of all. It may have made
        fewer steps than others, or none, if its parameters are frozen.
        """
        leaders, steps_made = self._leaders, self.columns["k"]
        pools = [[index for index, of in enumerate(leaders) if of == leader] for leader in set(leaders)]
        for pool in sorted(pool for pool in pools if len(pool) > 1):
            rows, first = (self.constants.int64(totals.device, indices) for indices in (pool, pool[:1]))
            totals = totals.index_copy(0, first, totals.index_select(0, rows).sum(dim=0, keepdim=True))
            most = steps_made.index_select(0, rows).amax(dim=0, keepdim=True)
            steps_made = steps_made.index_copy(0, first, most)
            learns = learns.index_copy(0, first, learns.index_select(0, rows).any(dim=0, keepdim=True))
        return totals, steps_made, learns

    def _follow_leaders_(self) -> None:
        """Copy the ``d`` of each pool, and what it was found from, to the groups that do not lead it."""
        leaders = self._leaders
        if len(set(leaders)) < len(leaders):
            rows = self.constants.int64(self.columns.device, leaders)
            for name in ("d", "d_hat", "d_numerator", "max_d_numerator", "d_denom"):
                self.columns[name].copy_(self.columns[name].index_select(0, rows))

    def _share_(self, happens: Tensor) -> None:
        """Set the step sizes in use, if the step ``happens`` (bool, 0-dim) and is not skipped."""
        shared, in_mean = self.columns["d"].clone(), self.columns["in_mean"].clone()
        if sharing := self.sharing:
            alike = AlikeGroups(sharing, self.columns, self.constants)
            for column, values in zip((shared, in_mean), alike.shared_d(), strict=True):
                alike.scatter_(column, values)
        for name, values in (("shared_d", shared), ("in_mean", in_mean)):
            self.columns[name].copy_(torch.where(happens, values, self.columns[name]))

    @functools.cached_property
    def _leaders(self) -> list[int]:
        """For each group, the index of the first group in its pool; its own index if it is in none."""
        first: dict[str, int] = {}
        return [
            group.index if (pool := group.options.pool) is None else first.setdefault(pool, group.index)
            for group in self.group_steps
        ]

    @functools.cached_property
    def sharing(self) -> list[GroupStep]:
        """The groups that move by the mean of several."""
        sharing = [group for group in self.group_steps if group.options.shares_mean]
        return sharing if len(sharing) > 1 else []
