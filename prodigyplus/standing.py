"""What moved as batches of kernels in one step, and does so in the next while only gradients have changed.

To find what moves, and whether it can, takes some ten microseconds a parameter; to see that nothing has
changed, one or two.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence

from torch import Tensor

from prodigyplus.engine.batches import Batch
from prodigyplus.engine.groups import GroupStep
from prodigyplus.engine.rule import Moving
from prodigyplus.placement import Location, Placement

States = Mapping[Tensor, dict[str, Tensor]]


class Standing:
    """The batches of a step.

    Ranks need not agree whether theirs stand: those of a rank that finds its own anew are the same ones.

    Args:
        placement: Where the optimiser's tensors lie.
        locations: Where all parameters of the optimiser stand: another list where they are others.
        groups: The groups in that step.
        states: The optimiser's.
        batches: What has moved in it.

    Attributes:
        batches: The same.
    """

    def __init__(
        self,
        placement: Placement,
        locations: list[Location],
        groups: Sequence[GroupStep],
        states: States,
        batches: Sequence[Batch],
    ) -> None:
        self._placement = placement
        self._locations = locations
        self._terms = [(group.options, group.adapts) for group in groups]
        self._states = list(states.values())
        self.batches = batches
        # Of each batch, its parameters and their states.
        self._parameters = [[locations[number - 1].p for number in batch.numbers] for batch in batches]
        self._states_of = [[states[p] for p in parameters] for parameters in self._parameters]
        moved = {p for parameters in self._parameters for p in parameters}
        self._idle = [location.p for location in locations if location.p not in moved]

    @classmethod
    def of(
        cls,
        placement: Placement,
        locations: list[Location],
        groups: Sequence[GroupStep],
        states: States,
        moving: Sequence[Moving],
    ) -> Standing | None:
        """What of a step may stand; None where something else than batches has moved.

        Args:
            placement, locations, groups, states: As of the class.
            moving: What has moved.
        """
        batches = [one for one in moving if isinstance(one, Batch)]
        if not batches or len(batches) < len(moving):
            return None
        return cls(placement, locations, groups, states, batches)

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
        if any(map(self._placement.takes_part, self._idle)):
            return False
        found = zip(self.batches, self._parameters, self._states_of, strict=True)
        return all(
            self._renew(batch, groups[batch.group.index], parameters, states_of)
            for batch, parameters, states_of in found
        )

    def _renew(
        self, batch: Batch, group: GroupStep, parameters: list[Tensor], states: list[dict[str, Tensor]]
    ) -> bool:
        placement = self._placement
        grads = placement.gradients(parameters)
        if grads is None:
            return False
        entries = placement.locals(itertools.chain.from_iterable(map(dict.values, states)))
        return batch.renew(group, placement.locals(parameters), entries, grads)

    def rest(self) -> None:
        """Let go of what is of one step alone."""
        for batch in self.batches:
            batch.rest()
