"""What moved as batches of kernels in one step, and does so in the next while only gradients have changed.

To find what moves, and whether it can, takes some ten microseconds a parameter; to see that nothing has
changed, one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import Tensor

from prodigyplus.engine.batches import Batch
from prodigyplus.engine.groups import GroupStep
from prodigyplus.engine.rule import Moving
from prodigyplus.placement import Location

States = Mapping[Tensor, dict[str, Tensor]]


class Standing:
    """The batches of a step of whole tensors.

    Args:
        locations: Where all parameters of the optimiser stand: another list where they are others.
        groups: The groups in that step.
        states: The optimiser's.
        batches: What has moved in it.

    Attributes:
        batches: The same.
    """

    def __init__(
        self, locations: list[Location], groups: Sequence[GroupStep], states: States, batches: Sequence[Batch]
    ) -> None:
        self._locations = locations
        self._terms = [(group.options, group.adapts) for group in groups]
        self._states = list(states.values())
        self.batches = batches
        moved = {weight for batch in batches for weight in batch.weights}
        self._idle = [location.p for location in locations if location.p not in moved]

    @classmethod
    def of(
        cls, locations: list[Location], groups: Sequence[GroupStep], states: States, moving: Sequence[Moving]
    ) -> Standing | None:
        """What of a step may stand; None where something else than batches has moved.

        Args:
            locations, groups, states: As of the class.
            moving: What has moved.
        """
        batches = [one for one in moving if isinstance(one, Batch)]
        return cls(locations, groups, states, batches) if batches and len(batches) == len(moving) else None

    def renew(self, locations: list[Location], groups: Sequence[GroupStep], states: States) -> bool:
        """Take up the gradients of another step, if they are all that has changed.

        Args:
            locations, groups, states: As of the class, in that step.

        Returns:
            Whether its batches are what moves in that step. If not, it is of no more use.
        """
        terms = zip(groups, self._terms, strict=False)
        # Equal options are one object.
        if not all(group.options is o and group.adapts == adapts for group, (o, adapts) in terms):
            return False
        if locations is not self._locations:
            return False
        if len(states) != len(self._states) or not all(map(operator.is_, states.values(), self._states)):
            return False
        if any(p.grad is not None for p in self._idle):
            return False
        return all(batch.renew(groups[batch.group.index]) for batch in self.batches)

    def rest(self) -> None:
        """Let go of what is of one step alone."""
        for batch in self.batches:
            batch.rest()
