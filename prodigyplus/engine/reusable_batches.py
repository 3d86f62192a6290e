"""Reuse a step's batches in the next step, as long as only gradients have changed.

Making batches for the kernels takes some ten microseconds a parameter; checking that nothing else has changed
takes one or two.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence

from torch import Tensor

from prodigyplus.engine.batches import Batch
from prodigyplus.engine.bundle import Bundle
from prodigyplus.engine.group_step import GroupStep
from prodigyplus.placement import Location, Placement

States = Mapping[Tensor, dict[str, Tensor]]


class ReusableBatches:
    """The batches of a step, kept to be reused.

    Ranks need not agree whether to reuse theirs: a rank that makes its batches again gets the same ones.

    Args:
        placement: Where the optimiser's tensors lie.
        locations: The locations of all parameters of the optimiser; another list once they have changed.
        groups: The groups in that step.
        states: The optimiser's ``state``.
        batches: The batches that have moved in that step.

    Attributes:
        batches: The batches.
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
        self._options = [(group.options, group.adapts) for group in groups]
        self._states = list(states.values())
        self.batches = batches
        # For each batch, its parameters and their states.
        self._parameters = [[locations[ordinal - 1].p for ordinal in batch.ordinals] for batch in batches]
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
        bundles: Sequence[Bundle],
    ) -> ReusableBatches | None:
        """The batches of a step, if they are all that has moved; otherwise None.

        Args:
            placement, locations, groups, states: As for the class.
            bundles: All that has moved in the step.
        """
        batches = [bundle for bundle in bundles if isinstance(bundle, Batch)]
        if not batches or len(batches) < len(bundles):
            return None
        return cls(placement, locations, groups, states, batches)

    def reuse_(self, locations: list[Location], groups: Sequence[GroupStep], states: States) -> bool:
        """Take the tensors of another step, if nothing but gradients has been replaced.

        Args:
            locations, groups, states: As for the class, in that step.

        Returns:
            Whether the batches can be reused in that step. If not, discard this object.
        """
        options = zip(groups, self._options, strict=False)
        # Equal options are one object.
        if not all(group.options is o and group.adapts == adapts for group, (o, adapts) in options):
            return False
        if locations is not self._locations:
            return False
        if len(states) != len(self._states) or not all(map(operator.is_, states.values(), self._states)):
            return False
        if any(map(self._placement.takes_part, self._idle)):
            return False
        found = zip(self.batches, self._parameters, self._states_of, strict=True)
        return all(
            self._reuse_(batch, groups[batch.group.index], parameters, states_of)
            for batch, parameters, states_of in found
        )

    def _reuse_(
        self, batch: Batch, group: GroupStep, parameters: list[Tensor], states: list[dict[str, Tensor]]
    ) -> bool:
        placement = self._placement
        grads = placement.gradients(parameters)
        if grads is None:
            return False
        entries = placement.locals(itertools.chain.from_iterable(map(dict.values, states)))
        return batch.reuse_(group, placement.locals(parameters), entries, grads)

    def drop_tensors_(self) -> None:
        """See :meth:`Batch.drop_tensors_`."""
        for batch in self.batches:
            batch.drop_tensors_()
