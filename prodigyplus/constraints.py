"""Sets that weights are held in: a projection onto the set, applied where a step has moved them.

Whoever changes weights behind an optimiser's back, as ``clamp_()`` after a step does, changes the weights of
training y alone: z goes on its way outside the set, which Prodigy takes for progress. Projected Schedule-Free
projects z, of which x is the average. As y = (1−β1) z + β1 x, it then makes ``1 − β1 (1 − c)`` of the change:
(1 − β1) of it, and β1 of the c that x takes. Of a convex set the average is in the set too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from prodigyplus.formulas import schedule_free
from prodigyplus.placement import Placement

Projection = Callable[[Tensor], Tensor | None]


class Constraint(NamedTuple):
    """Parameters, and the projection that holds them."""

    parameters: Sequence[Tensor]
    project: Projection

    def projected(self, values: Tensor) -> Tensor:
        """What the projection makes of a copy of ``values``.

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
        like: Any = values
        placed: Any = result  # of DTensors, where the parameter is
        if hasattr(like, "placements") and placed.placements != like.placements:
            placed = placed.redistribute(like.device_mesh, like.placements)
        held: Tensor = placed
        return held

    def hold_(self, p: Tensor, state: Mapping[str, Tensor], y_fraction: Tensor, placement: Placement) -> None:
        """Put a parameter and its base iterate, which a step has moved, back into the set.

        Args:
            p: The parameter, which holds y; a DTensor, if its state is.
            state: Its state.
            y_fraction: ``1 − β1 (1 − c)`` of the step; 0-dim.
            placement: Where they lie.
        """
        local = placement.local
        before = p.detach().clone() if schedule_free.OFFSET in state else p
        if schedule_free.is_averaged(state):
            z = schedule_free.base_iterate(p.detach(), state)
            moved = self.projected(z)
            change = local(moved) - local(z)
            local(p).add_(change * y_fraction.to(change))
        p.copy_(self.projected(p))
        if schedule_free.BASE in state:
            local(state[schedule_free.BASE]).add_(change)
        elif schedule_free.OFFSET in state:
            local(state[schedule_free.OFFSET]).add_(change - (local(p) - local(before)))

    def put_in_(self, state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Project the parameters, and what ``state`` has of their base iterates."""
        for p in self.parameters:
            p.copy_(self.projected(p))
            base = state.get(p, {}).get(schedule_free.BASE)
            if base is not None:
                base.copy_(self.projected(base))


class Constraints:
    """The constraints of an optimiser, in the order in which they were laid on."""

    def __init__(self) -> None:
        # Ordered, since RemovableHandle keeps a weak reference, which a plain dict cannot have.
        self._by_handle: OrderedDict[int, Constraint] = OrderedDict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Handles are numbered in each process from 0: by its old number one could replace another.
        self._by_handle = OrderedDict()
        for constraint in state["_by_handle"].values():
            self.add(constraint)

    def add(self, constraint: Constraint) -> RemovableHandle:
        """Lay one on; returns a handle that lifts it."""
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
