"""One step of the optimiser: of all parameters at once, or inside backward, as their gradients come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodigyplus import driver, stepsize
from prodigyplus.rule import Part
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
        in_backward: Whether a gradient of a backward pass begins it.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], exchange: driver.Exchange, *, in_backward: bool
    ) -> None:
        self.groups = [GroupStep(group) for group in groups]
        # torch's checkpoint helpers make state by a step with lr=0 and zero gradients, in any mode.
        self.only_makes_state = not in_backward and all(group.options.lr_is_zero for group in self.groups)
        self.taken: set[Tensor] = set()
        self._fused = not self.only_makes_state and any(g.options.fused_back_pass for g in self.groups)
        self._exchange = exchange
        self._seen: list[_Seen] = []
        self._waiting: list[Part] = []
        self._waiting_bytes = 0
        if self._fused:
            for group in self.groups:
                group.alone = True
                group.open(torch.ones_like(group.numbers["d"], dtype=torch.bool))

    def take(self, p: Tensor, part: Part) -> None:
        """Move a parameter now; or, where its sums cross processes, with others, once they fill a bucket."""
        self.taken.add(p)
        if part.layout.is_whole:
            self._run([part])
            return
        self._waiting.append(part)
        self._waiting_bytes += driver.size_of(part)
        if self._waiting_bytes >= self._exchange.bucket_bytes:
            waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
            self._run(waiting)

    def _run(self, parts: Sequence[Part]) -> None:
        driver.run(parts, self._exchange, self._see)

    def close(self, parts: Sequence[Part]) -> None:
        """Move the rest of the parameters, then the step sizes."""
        if self._fused:
            self._run([*self._waiting, *parts])
            self._commit()
        else:
            driver.run(parts, self._exchange, self._open)
        totals = self._exchange.everywhere(torch.stack([group.totals() for group in self.groups]))
        stepsize.close(self.groups, totals)
        for group in self.groups:
            group.numbers["calls"] += not group.options.lr_is_zero

    def _see(self, parts: Sequence[Part], answers: Sequence[driver.Answer]) -> None:
        self._seen += [
            _Seen(part.group, answer["total"], answer.get("present"))
            for part, answer in zip(parts, answers, strict=True)
        ]

    def _open(self, parts: Sequence[Part], answers: Sequence[driver.Answer]) -> None:
        """Fix the numbers of all groups, once it is known of all gradients whether they are finite."""
        self._see(parts, answers)
        square, *present = self._everywhere([seen.present for seen in self._seen])
        finite = square.isfinite()
        counts = finite & (square > 0) if self.only_makes_state else finite
        for group, here in zip(self.groups, present, strict=True):
            group.open(counts & (here > 0))
            group.commit(counts & (here > 0), skips=~finite & (here > 0), adapts=counts & (here > 0))

    def _commit(self) -> None:
        """Count the step of all groups, whose parameters have moved, or not, each for itself."""
        finite = [seen.square.isfinite() for seen in self._seen]
        moved = [
            good if seen.present is None else good * seen.present
            for good, seen in zip(finite, self._seen, strict=True)
        ]
        square, *counts = self._everywhere([seen.present for seen in self._seen], moved)
        all_finite = square.isfinite()
        present, any_moved = counts[: len(self.groups)], counts[len(self.groups) :]
        for group, here, here_moved in zip(self.groups, present, any_moved, strict=True):
            group.commit(here_moved > 0, skips=~all_finite & (here > 0), adapts=all_finite & (here > 0))

    def _everywhere(self, *counts: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The sum of all squares, then for each of ``counts`` its sums by group; 0-dim tensors.

        The first is not finite if any gradient is not; the others only count as zero or more.

        Args:
            counts: Of each part seen, a number for each parameter, or None for ones.
        """
        d: Tensor = self.groups[0].numbers["d"]
        zero = d.new_zeros(1)
        sums = [torch.cat([zero, *(seen.square.to(d.device, d.dtype) for seen in self._seen)]).sum()]
        for values in counts:
            by_group = {id(group): [zero] for group in self.groups}
            for seen, count in zip(self._seen, values, strict=True):
                count = torch.ones_like(seen.square) if count is None else count
                by_group[id(seen.group)].append(count.to(d.device, d.dtype))
            sums += [torch.cat(column).sum() for column in by_group.values()]
        return self._exchange.everywhere(torch.stack(sums)).unbind()
