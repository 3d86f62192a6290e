"""An optimiser as its parts see it: parameters, states, where these lie, and what constrains them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from prodigyplus.constraints import Constraints
from prodigyplus.formulas import schedule_free
from prodigyplus.placement import Placement, locations


class View(NamedTuple):
    """The parameters of an optimiser, their states, where they lie, and the sets that hold them."""

    groups: Sequence[dict[str, Any]]
    state: MutableMapping[Tensor, dict[str, Tensor]]
    placement: Placement
    constraints: Constraints

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [p for group in self.groups for p in group["params"]]

    @property
    def is_evaluating(self) -> bool:
        """Whether some group is in eval mode."""
        return any(group["use_schedulefree"] and not group["train_mode"] for group in self.groups)

    def in_other_mode(self, *, train: bool) -> list[dict[str, Any]]:
        """The Schedule-Free groups that are in the other mode."""
        return [g for g in self.groups if g["use_schedulefree"] and g["train_mode"] != train]

    def averaged(self, group: Mapping[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The parameters of a group whose average differs from their weights, with their local states."""
        for p in group["params"]:
            # Before the first step there may be state, but x is y.
            if group["calls"] and schedule_free.is_averaged(self.state.get(p, {})):
                yield p, self.placement.local_state(self.state[p])

    def own_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (parameter, local tensor) of what only the optimiser should change, since z goes with it."""
        held = {p for _, p in self.constraints}
        for p in self.parameters:  # the state may still have those of a group that was removed
            if p not in held and schedule_free.is_averaged(self.state.get(p, {})):
                weight = self.placement.local(p)
                if not weight.is_inference():
                    yield p, weight

    def name_of(self, p: Tensor) -> str:
        """What to call a parameter in a message."""
        return next(location.name_in(self.groups) for location in locations(self.groups) if location.p is p)

    def lacks_gradients(self) -> bool:
        """Whether there are parameters to train, and none of them has a gradient."""
        trains = False
        # At every step: it ends at the first gradient, without a list of all parameters.
        for p in (p for group in self.groups for p in group["params"]):
            if p.grad is not None:
                return False
            trains |= p.requires_grad
        return trains
