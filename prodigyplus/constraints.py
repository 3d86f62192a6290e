"""Sets that weights are held in: a projection onto the set, applied where a step has moved them.

Clamping weights after a step changes the training weights y alone: z stays outside the set, and Prodigy takes
that for progress. So z is projected, as in projected Schedule-Free. x, the average of z, takes a fraction c
of the change, and y = (1−β1) z + β1 x takes (1−β1) + β1 c = 1 − β1 (1−c) of it. The average of points of a
convex set is in the set.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from prodigyplus.formulas import schedule_free
from prodigyplus.placement import Placement

Projection = Callable[[Tensor], Tensor | None]


class Constraint(NamedTuple):
    """Parameters, and the projection that holds them."""

    parameters: Sequence[Tensor]
    project: Projection

    def projected(self, values: Tensor, placement: Placement) -> Tensor:
        """What the projection makes of a copy of ``values``, which lies as these do.

        Raises:
            ValueError: It gives a tensor of another shape.
        """
        copy = values.detach().clone()
        given: Any = self.project(copy)
        result: Any = copy if given is None else given
        if not isinstance(result, Tensor) or result.shape != values.shape:
            found = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise ValueError(
                f"constrain: project() made {found} of a tensor of shape {tuple(values.shape)}: it must "
                "change what it is given in place, or return what it makes of it, of the same shape."
            )
        return placement.place_like(result, values)

    def hold_(
        self,
        p: Tensor,
        state: Mapping[str, Tensor],
        placement: Placement,
        y_fraction: Tensor,
        happens: Tensor,
    ) -> None:
        """Put a parameter and its base iterate, which a step has moved, back into the set.

        Args:
            p: The parameter, which holds y; a DTensor, if its state is.
            state: Its state.
            placement: Where they lie.
            y_fraction: ``1 − β1 (1 − c)`` of the step; 0-dim.
            happens: False if the step was skipped: then nothing changes; bool, 0-dim.
        """
        local, y = placement.local, p.detach().clone()
        if schedule_free.is_averaged(state):
            z = schedule_free.base_iterate(p.detach(), state)
            held_z = self.projected(z, placement)
            change = local(held_z) - local(z)
            local(y).add_(change * y_fraction.to(change))
        y = self.projected(y, placement)
        if schedule_free.BASE in state:
            _write_(local(state[schedule_free.BASE]), local(held_z), happens)
        elif schedule_free.OFFSET in state:
            # By its change, so that what is in the set already keeps its bits.
            offset = local(state[schedule_free.OFFSET])
            _write_(offset, offset + (change - (local(y) - local(p))), happens)
        _write_(local(p), local(y), happens)

    def changes(
        self, p: Tensor, state: dict[str, Tensor], placement: Placement, beta1: float
    ) -> list[tuple[Tensor, Tensor]]:
        """What puts a parameter, its base iterate and their average into the set, from however far outside.

        Args:
            p, placement: As for :meth:`hold_`.
            state: Its state; empty if its average is its weight.
            beta1: The β1 of its group.

        Returns:
            Pairs of the tensors to change, and what to copy into them.
        """
        if not schedule_free.is_averaged(state):
            return [(p, self.projected(p, placement))]
        local, x, y = placement.local, p.detach().clone(), p.detach().clone()
        schedule_free.x_from_y(local(p), placement.local_state(state), beta1, out=local(x))
        z = self.projected(schedule_free.base_iterate(p.detach(), state), placement)
        x = self.projected(x, placement)
        schedule_free.y_from_x(local(x), {schedule_free.BASE: local(z)}, beta1, out=local(y))
        y = self.projected(y, placement).to(p.dtype)
        if schedule_free.BASE in state:
            return [(p, y), (local(state[schedule_free.BASE]), local(z))]
        return [(p, y), (local(state[schedule_free.OFFSET]), local(z) - local(y))]


def _write_(target: Tensor, values: Tensor, happens: Tensor) -> None:
    target.copy_(torch.where(happens, values, target))


class Constraints:
    """The constraints of an optimiser, in the order in which they were added."""

    def __init__(self) -> None:
        # Ordered, since RemovableHandle keeps a weak reference, which a plain dict cannot have.
        self._by_handle: OrderedDict[int, Constraint] = OrderedDict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Handles are numbered in each process from 0: by its old number one could replace another.
        self._by_handle = OrderedDict()
        for constraint in state["_by_handle"].values():
            self.add(constraint)

    def add(self, constraint: Constraint) -> RemovableHandle:
        """Add a constraint; returns a handle that removes it."""
        handle = RemovableHandle(self._by_handle)
        self._by_handle[handle.id] = constraint
        return handle

    def __iter__(self) -> Iterator[tuple[Constraint, Tensor]]:
        """Every constraint with each of its parameters."""
        return ((constraint, p) for constraint in self._by_handle.values() for p in constraint.parameters)

    def __bool__(self) -> bool:
        return bool(self._by_handle)

    def of(self, p: Tensor) -> list[Constraint]:
        """The constraints that hold a parameter."""
        return [constraint for constraint, held in self if held is p]
