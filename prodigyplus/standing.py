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
        batches: What moved in it.
    """

    def __init__(
        self, locations: list[Location], groups: Sequence[GroupStep], states: States, batches: Sequence[Batch]
    ) -> None:
        self._locations = locations
        self._terms = _terms(groups)
        self._states = list(states.values())
        self._batches = batches
        moved = {weight for batch in batches for weight in batch.weights}
        self._idle = [location.p for location in locations if location.p not in moved]

    @classmethod
    def of(
        cls, locations: list[Location], groups: Sequence[GroupStep], states: States, moving: Sequence[Moving]
    ) -> Standing | None:
        """What of a step may stand; None where something else than batches has moved.

        Args:
            locations, groups, states: As of the class.
            moving: What moved.
        """
        batches = [one for one in moving if isinstance(one, Batch)]
        return cls(locations, groups, states, batches) if batches and len(batches) == len(moving) else None

    def renewed(
        self, locations: list[Location], groups: Sequence[GroupStep], states: States
    ) -> Sequence[Batch] | None:
        """The batches in another step, with its gradients; None where something else has changed.

        Args:
            locations, groups, states: As of the class, in that step.
        """
        if locations is not self._locations or _terms(groups) != self._terms:
            return None
        if len(states) != len(self._states) or not all(map(operator.is_, states.values(), self._states)):
            return None
        if any(p.grad is not None for p in self._idle):
            return None
        renewed = (batch.renew(groups[batch.group.index]) for batch in self._batches)
        return self._batches if all(renewed) else None

    def rest(self) -> None:
        """Let go of what is of one step alone."""
        for batch in self._batches:
            batch.rest()


def _terms(groups: Sequence[GroupStep]) -> list[tuple[int, bool]]:
    """What the batches of groups hang on: the options, equal ones of which are one object, and the rest."""
    return [(id(group.options), group.adapts) for group in groups]
