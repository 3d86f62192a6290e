"""One step of the optimiser: of all parameters at once, or inside backward, as their gradients come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodigyplus.engine import driver
from prodigyplus.engine.columns import Columns
from prodigyplus.engine.groups import Groups, GroupStep
from prodigyplus.engine.rule import Moving, ParamStep
from prodigyplus.terms.scalars import Constants


class _Seen(NamedTuple):
    """What is known of a stack's gradients after the first round; shapes (count,)."""

    group: GroupStep
    numbers: list[int]  # of its parameters
    square: Tensor  # the sums of squares of its tensors, not finite if one of their elements is not
    present: Tensor | None  # on how many ranks there are gradients of them; None: on all


class Step:
    """One step, from its first gradient to its end.

    Plain, all parameters come at the end, and none moves if any gradient is not finite. Fused with the
    backward pass, they may come before, and each moves, or is skipped, for itself.

    Args:
        entries: The optimiser's ``param_groups``.
        columns: Their numbers.
        exchange: Completes sums over shards.
        constants: The optimiser's.
        in_backward: Whether a gradient of a backward pass begins it.
    """

    def __init__(
        self,
        entries: Sequence[dict[str, Any]],
        columns: Columns,
        exchange: driver.Exchange,
        constants: Constants,
        *,
        in_backward: bool,
    ) -> None:
        self._exchange = exchange
        self._constants = constants
        self._zeros = columns.zeros
        self.groups = Groups(entries, columns, constants)
        # torch's checkpoint helpers make state by a step with lr=0 and zero gradients, in any mode.
        self.initializes_state = not in_backward and all(g.options.lr_is_zero for g in self.groups.steps)
        self.taken: set[Tensor] = set()
        self._seen: list[_Seen] = []
        self._waiting: list[ParamStep] = []
        self._waiting_bytes = 0
        fuses = any(group.options.fused_back_pass for group in self.groups.steps)
        self._skips_per_param = fuses and not self.initializes_state
        if self._skips_per_param:
            for group in self.groups.steps:
                group.skips_per_param = True
            # Each parameter may move before it is known of the others whether they do.
            self._opened = self.groups.open(torch.ones_like(self._zeros, dtype=torch.bool))

    def take(self, p: Tensor, param: ParamStep) -> None:
        """Move a parameter now; or, where its sums cross processes, with others, once they fill a bucket."""
        self.taken.add(p)
        if param.layout.is_whole:
            self._move([param])
            return
        self._waiting.append(param)
        self._waiting_bytes += param.nbytes
        if self._waiting_bytes >= self._exchange.bucket_bytes:
            waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
            self._move(waiting)

    def stacked(self, params: Sequence[ParamStep]) -> list[Moving]:
        """The rest of the parameters, as they move: those that have waited for others, and ``params``."""
        return driver.stacked([*self._waiting, *params], self._exchange.bucket_bytes)

    def close(self, rest: Sequence[Moving]) -> None:
        """Move the rest of the parameters, then the step sizes."""
        if self._skips_per_param:
            driver.finish(self._start(rest), self._exchange)
            learns = self._count_each()
        else:
            running = self._start(rest)
            learns = self._open_and_count()
            driver.finish(running, self._exchange)
        totals = self._exchange.sum_over_stages(self.groups.totals())
        self.groups.close(totals, learns)
        for group in self.groups.steps:
            if not group.options.lr_is_zero:
                group.entry["calls"] += 1
                group.entry["frozen"] = not group.adapts

    def _move(self, params: Sequence[ParamStep]) -> None:
        stacks = driver.stacked(params, self._exchange.bucket_bytes)
        driver.finish(self._start(stacks), self._exchange)

    def _start(self, stacks: Sequence[Moving]) -> list[driver.Running]:
        running = driver.start(stacks, self._exchange, self._constants)
        self._seen += [
            _Seen(one.stack.group, one.stack.numbers, one.answers["total"], one.answers.get("present"))
            for one in running
        ]
        return running

    def _open_and_count(self) -> Tensor:
        """Set the numbers of all groups, once it is known of all gradients whether they are finite.

        Returns:
            bool, (groups,): whether the evidence of the step is to move ``d``.
        """
        square, present = self._sums_by_group([seen.present for seen in self._seen])
        return self.groups.begin(square, present, initializes=self.initializes_state)

    def _count_each(self) -> Tensor:
        """Count the step of all groups, whose parameters have moved, or not, each for itself.

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
        return self.groups.commit(self._opened, moves > 0, skips, learns)

    def _sums_by_group(self, *counts: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The sum of all squares, 0-dim, then for each of ``counts`` its sums by group; shapes (groups,).

        The first is not finite if any gradient is not; the others only count as zero or more.

        Args:
            counts: Of each stack seen, a number for each parameter, or None where each counts as one.
        """
        zeros = self._zeros
        squares = [seen.square.to(zeros.device, zeros.dtype) for seen in self._seen]
        every = torch.cat([zeros[:1], *squares]) if len(squares) != 1 else squares[0]
        sums = [every.sum(0, keepdim=True)]
        groups = tuple((seen.group.index, len(seen.numbers)) for seen in self._seen)
        index = self._constants.made(
            zeros.device,
            ("groups", groups),
            lambda: (
                torch.tensor([group for group, count in groups for _ in range(count)], device="cpu")
                .long()
                .to(zeros.device, non_blocking=True)
            ),
        )
        ones = self._constants.made(zeros.device, "ones", lambda: zeros[:1] + 1)
        for of_stacks in counts:
            if all(count is None for count in of_stacks):
                # It is the same at every step.
                sums.append(
                    self._constants.made(
                        zeros.device,
                        ("parameters", len(zeros), groups),
                        lambda: zeros.index_add(0, index, ones.expand(len(index))),
                    )
                )
                continue
            values = [
                ones.expand(len(seen.numbers)) if count is None else count.to(zeros)
                for seen, count in zip(self._seen, of_stacks, strict=True)
            ]
            sums.append(zeros.index_add(0, index, torch.cat([zeros[:0], *values])))
        whole = self._exchange.sum_over_stages(torch.cat(sums))
        return whole[0], *whole[1:].view(len(counts), -1).unbind()
