"""One step of the optimiser: all parameters at once, or within backward, as their gradients come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodigyplus.engine import driver
from prodigyplus.engine.bundle import Bundle
from prodigyplus.engine.columns import Columns
from prodigyplus.engine.group_step import GroupStep
from prodigyplus.engine.groups import Groups
from prodigyplus.engine.param_step import ParamStep
from prodigyplus.exchange import Exchange
from prodigyplus.terms.device_constants import Constants, int64_on


class _Seen(NamedTuple):
    """What the first round found out about a bundle's gradients; shapes (count,)."""

    group: GroupStep
    ordinals: list[int]  # of its parameters
    square: Tensor  # the sum of squares of each gradient; not finite if an element is not
    present: Tensor | None  # on how many ranks each has a gradient; None: on all


class Step:
    """One step, from its first gradient to its end.

    Ordinarily, all parameters move at the end, and none moves if any gradient is not finite. With a fused
    backward pass, they may move earlier, and each moves or is skipped individually.

    Args:
        param_groups: The optimiser's ``param_groups``.
        columns: The numbers of the groups.
        exchange: Completes sums over shards.
        constants: The optimiser's cache of constants.
        in_backward: Whether the step begins with a gradient within a backward pass.
    """

    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        columns: Columns,
        exchange: Exchange,
        constants: Constants,
        *,
        in_backward: bool,
    ) -> None:
        self._exchange = exchange
        self._constants = constants
        self._zeros = columns.zeros
        self.groups = Groups(param_groups, columns, constants)
        group_steps = self.groups.group_steps
        # torch's checkpoint helpers make state by a step with lr=0 and zero gradients, in any mode.
        self.initializes_state = not in_backward and all(g.options.lr_is_zero for g in group_steps)
        self.taken: set[Tensor] = set()
        self._seen: list[_Seen] = []
        self._waiting: list[ParamStep] = []
        self._waiting_bytes = 0
        fuses = any(group.options.fused_back_pass for group in group_steps)
        self._skips_per_param = fuses and not self.initializes_state
        if self._skips_per_param:
            for group in group_steps:
                group.skips_per_param = True
            # A parameter may move before it is known whether others do.
            self._uncounted = self.groups.set_numbers(torch.ones_like(self._zeros, dtype=torch.bool))

    def take(self, p: Tensor, param: ParamStep) -> None:
        """Move a parameter now; or, if its sums span ranks, together with others once they fill a bucket."""
        self.taken.add(p)
        if param.layout.is_whole:
            self._move([param])
            return
        self._waiting.append(param)
        self._waiting_bytes += param.nbytes
        if self._waiting_bytes >= self._exchange.bucket_bytes:
            waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
            self._move(waiting)

    def bundled(self, params: Sequence[ParamStep]) -> list[Bundle]:
        """The rest of the parameters in bundles: those still waiting, and ``params``."""
        return driver.bundled([*self._waiting, *params], self._exchange.bucket_bytes)

    def close(self, rest: Sequence[Bundle]) -> None:
        """Move the rest of the parameters, then update the step sizes."""
        if self._skips_per_param:
            driver.finish(self._start(rest), self._exchange)
            learns = self._count_each()
        else:
            running = self._start(rest)
            learns = self._open_and_count()
            driver.finish(running, self._exchange)
        totals = self._exchange.sum_over_stages(self.groups.totals())
        self.groups.end(totals, learns)
        for group in self.groups.group_steps:
            if not group.options.lr_is_zero:
                group.param_group["calls"] += 1
                group.param_group["frozen"] = not group.adapts

    def _move(self, params: Sequence[ParamStep]) -> None:
        bundles = driver.bundled(params, self._exchange.bucket_bytes)
        driver.finish(self._start(bundles), self._exchange)

    def _start(self, bundles: Sequence[Bundle]) -> list[driver.Running]:
        running = driver.start(bundles, self._exchange, self.groups.last_step_sizes)
        self._seen += [
            _Seen(one.bundle.group, one.bundle.ordinals, one.answers["total"], one.answers.get("present"))
            for one in running
        ]
        return running

    def _open_and_count(self) -> Tensor:
        """Set the numbers of all groups, now that it is known whether all gradients are finite.

        Returns:
            Whether the evidence of the step updates each group's ``d``; bool, (groups,).
        """
        square, present = self._sums_by_group([seen.present for seen in self._seen])
        return self.groups.begin(square, present, initializes=self.initializes_state)

    def _count_each(self) -> Tensor:
        """Count the step in all groups, whose parameters have moved or been skipped individually.

        Returns:
            As :meth:`_open_and_count`.
        """
        finite = [seen.square.isfinite() for seen in self._seen]
        moved = [
            good if seen.present is None else good * seen.present
            for good, seen in zip(finite, self._seen, strict=True)
        ]
        square, present, moves = self._sums_by_group([seen.present for seen in self._seen], moved)
        all_finite = square.isfinite()
        skips, learns = ~all_finite & (present > 0), all_finite & (present > 0)
        return self.groups.count(self._uncounted, moves > 0, skips, learns)

    def _sums_by_group(self, *counts: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The sum of all squares, 0-dim, and the sums by group of each of ``counts``, (groups,).

        The first is not finite if any gradient is not. Of the others, it only matters whether they are above
        zero.

        Args:
            counts: For each bundle seen, a number for each parameter, or None if each counts as one.
        """
        zeros = self._zeros
        squares = [seen.square.to(zeros.device, zeros.dtype) for seen in self._seen]
        every = torch.cat([zeros[:1], *squares]) if len(squares) != 1 else squares[0]
        sums = [every.sum(0, keepdim=True)]
        groups = tuple((seen.group.index, len(seen.ordinals)) for seen in self._seen)
        index = self._constants.get_recent(
            zeros.device,
            ("groups", groups),
            lambda: int64_on(zeros.device, [group for group, count in groups for _ in range(count)]),
        )
        sums += [self._counted(of_bundles, groups, index) for of_bundles in counts]
        whole = self._exchange.sum_over_stages(torch.cat(sums))
        return whole[0], *whole[1:].view(len(counts), -1).unbind()

    def _counted(
        self, counts: Sequence[Tensor | None], groups: tuple[tuple[int, int], ...], index: Tensor
    ) -> Tensor:
        """The sums by group of one of the counts of :meth:`_sums_by_group`; (groups,).

        Args:
            counts: As in that method.
            groups: For each bundle seen, the index of its group, and how many parameters it has.
            index: The index of each parameter's group; int64.
        """
        zeros = self._zeros
        ones = self._constants.get(zeros.device, "ones", lambda: zeros[:1] + 1)
        if all(count is None for count in counts):  # the sum is the same at every step
            return self._constants.get_recent(
                zeros.device,
                ("parameters", len(zeros), groups),
                lambda: zeros.index_add(0, index, ones.expand(len(index))),
            )
        values = [
            ones.expand(len(seen.ordinals)) if count is None else count.to(zeros)
            for seen, count in zip(self._seen, counts, strict=True)
        ]
        return zeros.index_add(0, index, torch.cat([zeros[:0], *values]))
