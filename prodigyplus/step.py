"""One step of the optimiser: of all parameters at once, or inside backward, as their gradients come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodigyplus import driver, stepsize
from prodigyplus.rule import Member, Part
from prodigyplus.scalars import Constants
from prodigyplus.stepsize import GroupStep


class _Seen(NamedTuple):
    """What is known of a part's gradients after the first round; shapes (count,)."""

    group: GroupStep
    square: Tensor  # the sums of squares of its tensors, not finite if one of their elements is not
    present: Tensor | None  # how many pieces of them are there; None: all


class Step:
    """One step, from its first gradient to its end.

    Plain, all parameters come at the end, and none moves if any gradient is not finite. Fused with the
    backward pass, they may come before, and each moves, or is skipped, for itself.

    Args:
        groups: The optimiser's groups, their numbers as tensors (see :func:`prodigyplus.stepsize.lift`).
        exchange: Completes sums over shards.
        constants: Those of the optimiser.
        in_backward: Whether a gradient of a backward pass begins it.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        exchange: driver.Exchange,
        constants: Constants,
        *,
        in_backward: bool,
    ) -> None:
        self.groups = [GroupStep(group, constants) for group in groups]
        self._alike = stepsize.Alike.split(self.groups)
        # torch's checkpoint helpers make state by a step with lr=0 and zero gradients, in any mode.
        self.only_makes_state = not in_backward and all(group.options.lr_is_zero for group in self.groups)
        self._places = {id(group): place for place, group in enumerate(self.groups)}
        self._zeros = self.groups[0].numbers["d"].new_zeros(len(self.groups))
        self.taken: set[Tensor] = set()
        self._fused = not self.only_makes_state and any(g.options.fused_back_pass for g in self.groups)
        self._exchange = exchange
        self._constants = constants
        self._seen: list[_Seen] = []
        self._waiting: list[Member] = []
        self._waiting_bytes = 0
        if self._fused:
            for group in self.groups:
                group.alone = True
            every = torch.ones_like(self._zeros, dtype=torch.bool)
            for alike in self._alike:
                alike.open(alike.mine(every))

    def take(self, p: Tensor, member: Member) -> None:
        """Move a parameter now; or, where its sums cross processes, with others, once they fill a bucket."""
        self.taken.add(p)
        if member.layout.is_whole:
            self._run([member])
            return
        self._waiting.append(member)
        self._waiting_bytes += member.nbytes
        if self._waiting_bytes >= self._exchange.bucket_bytes:
            waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
            self._run(waiting)

    def _run(self, members: Sequence[Member]) -> None:
        driver.run(members, self._exchange, self._see)

    def close(self, members: Sequence[Member]) -> None:
        """Move the rest of the parameters, then the step sizes."""
        if self._fused:
            self._run([*self._waiting, *members])
            self._commit()
        else:
            driver.run(members, self._exchange, self._open)
        totals = self._exchange.everywhere(torch.stack([group.totals() for group in self.groups]))
        stepsize.close(self.groups, totals)
        for group in self.groups:
            if not group.options.lr_is_zero:
                group.numbers["calls"] += 1
                group.numbers["frozen"] = not group.adapts

    def _see(self, parts: Sequence[Part], answers: Sequence[driver.Answer]) -> None:
        self._seen += [
            _Seen(part.group, answer["total"], answer.get("present"))
            for part, answer in zip(parts, answers, strict=True)
        ]

    def _open(self, parts: Sequence[Part], answers: Sequence[driver.Answer]) -> None:
        """Fix the numbers of all groups, once it is known of all gradients whether they are finite."""
        self._see(parts, answers)
        square, here = self._everywhere([seen.present for seen in self._seen])
        finite = square.isfinite()
        counts = finite & (square > 0) if self.only_makes_state else finite
        moves, skips = counts & (here > 0), ~finite & (here > 0)
        for alike in self._alike:
            alike.open(alike.mine(moves))
            alike.commit(alike.mine(moves), alike.mine(skips), adapts=alike.mine(moves))

    def _commit(self) -> None:
        """Count the step of all groups, whose parameters have moved, or not, each for itself."""
        finite = [seen.square.isfinite() for seen in self._seen]
        moved = [
            good if seen.present is None else good * seen.present
            for good, seen in zip(finite, self._seen, strict=True)
        ]
        square, here, moves = self._everywhere([seen.present for seen in self._seen], moved)
        all_finite = square.isfinite()
        skips, adapts = ~all_finite & (here > 0), all_finite & (here > 0)
        for alike in self._alike:
            alike.commit(alike.mine(moves > 0), alike.mine(skips), alike.mine(adapts))

    def _everywhere(self, *counts: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The sum of all squares, 0-dim, then for each of ``counts`` its sums by group; shapes (groups,).

        The first is not finite if any gradient is not; the others only count as zero or more.

        Args:
            counts: Of each part seen, a number for each parameter, or None where each counts.
        """
        zeros = self._zeros
        one = zeros[:1] + 1
        squares = [seen.square.to(zeros.device, zeros.dtype) for seen in self._seen]
        sums = [torch.cat([zeros[:1], *squares]).sum(0, keepdim=True)]
        for of_parts in counts:
            values = [one if count is None else count.to(zeros) for count in of_parts]
            groups = [
                self._places[id(seen.group)]
                for seen, value in zip(self._seen, values, strict=True)
                for _ in range(len(value))
            ]
            index = self._constants.on(zeros.device, groups)
            sums.append(zeros.index_add(0, index, torch.cat([zeros[:0], *values])))
        whole = self._exchange.everywhere(torch.cat(sums))
        return whole[0], *whole[1:].view(len(counts), -1).unbind()
