"""Notice that ranks no longer agree: numbers that all should have are compared along with other sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prodigyplus.terms.requests import Answers, Asked, Sum

# How far a rank's number may be from the mean of all, relative to its own. What differs by less, as between
# GPUs of two kinds that hold the same plain tensors, does no harm.
_TOLERANCE = 1e-3


class Agreement(NamedTuple):
    """Numbers that all ranks should have, and their sums over some ranks."""

    own: Tensor  # this rank's; float32, (numbers,)
    totals: Tensor
    ranks: Tensor  # how many ranks these are; 0-dim

    @classmethod
    def of(cls, asked: Asked, answers: Answers) -> Agreement | None:
        """From what :func:`requests` has asked for, and its answers; None if that was nothing."""
        return cls(asked["totals"].local, **answers) if asked else None

    def fails(self) -> Tensor:
        """Which of the numbers differ on other ranks; bool, (numbers,)."""
        own, totals, ranks = self
        return (totals - ranks * own).abs() > _TOLERANCE * ranks * own.abs()


def requests(step_sizes: Callable[[], Tensor], asked: Sequence[Asked], *, compare_whole: bool) -> Asked:
    """What to ask for beside the sums of a step's first round; nothing if none of these spans ranks.

    Args:
        step_sizes: Returns this rank's; float32, (groups,).
        asked: The sums of the round: of the gradients' squares.
        compare_whole: Whether the gradients of tensors that each rank holds whole should be equal. The sum of
            all their squares is then the last number.
    """
    spanning = [sum_ for sums in asked for sum_ in sums.values() if sum_.axes]
    if not spanning:
        return {}
    # What travels along one axis travels in one buffer, and so must be on one device.
    device = spanning[0].local.device
    axes = tuple(dict.fromkeys(axis for s in spanning if s.local.device == device for axis in s.axes))
    own = step_sizes().to(device)
    whole = [sums["total"].local.sum() for sums in asked if not sums["total"].axes]
    if whole and compare_whole:
        total = torch.stack([value.to(own) for value in whole]).sum(0, keepdim=True)
        own = torch.cat((own, total))
    return {"totals": Sum(own, axes), "ranks": Sum(own.new_ones(()), axes)}
