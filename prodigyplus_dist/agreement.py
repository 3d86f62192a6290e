"""Notice that ranks no longer agree: numbers that all should have are compared along with other sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.terms.requests import Answers, Asked, Sum

# How far a rank's number may be from the mean over the ranks, as a fraction of its own. Smaller differences,
# such as those between two models of GPU, do no harm.
_TOLERANCE = 1e-3


class Agreement(NamedTuple):
    """Numbers that all ranks should have, by name, and their sums over some ranks."""

    own: Mapping[str, Tensor]  # this rank's
    totals: Mapping[str, Tensor]  # of the same shapes
    ranks: Tensor  # how many ranks these are; 0-dim

    @classmethod
    def of(cls, asked: Asked, answers: Answers) -> Agreement | None:
        """From what :func:`requests` has asked for, and its answers; None if that was nothing."""
        if not asked:
            return None
        totals = dict(answers)
        ranks = totals.pop("ranks")
        return cls({name: asked[name].local for name in totals}, totals, ranks)

    def differing(self) -> dict[str, Tensor]:
        """Which of the numbers differ from their mean over the ranks, so that some rank has another; bool."""
        return {
            name: (total - self.ranks * self.own[name]).abs() > _TOLERANCE * self.ranks * self.own[name].abs()
            for name, total in self.totals.items()
        }


def requests(step_sizes: Callable[[], Tensor], asked: Sequence[Asked], *, compare_whole: bool) -> Asked:
    """What to ask for beside the sums of a step's first round; nothing if none of these spans ranks.

    Args:
        step_sizes: Returns this rank's step sizes; float32, (groups,).
        asked: The sums of the round: of the gradients' squares.
        compare_whole: Whether the gradients of tensors that each rank holds whole should be equal. The sum of
            all their squares is then compared, too.
    """
    spanning = [sum_ for sums in asked for sum_ in sums.values() if sum_.axes]
    if not spanning:
        return {}
    # What travels along one axis travels in one buffer, and so must be on one device.
    device = spanning[0].local.device
    axes = tuple(dict.fromkeys(axis for s in spanning if s.local.device == device for axis in s.axes))
    own = {"step_sizes": step_sizes().to(device)}
    whole = [sums["total"].local.sum() for sums in asked if not sums["total"].axes]
    if whole and compare_whole:
        own["gradients"] = torch.stack([value.to(own["step_sizes"]) for value in whole]).sum()
    own["ranks"] = own["step_sizes"].new_ones(())
    return {name: Sum(number, axes) for name, number in own.items()}
