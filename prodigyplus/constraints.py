"""Sets that weights are held in: a projection onto the set, applied where a step has moved them.

Whoever changes weights behind an optimiser's back, as ``clamp_()`` after a step does, changes the weights of
training y alone: z goes on its way outside the set, which Prodigy takes for progress. Projected Schedule-Free
projects z, of which x is the average. As y = (1−β1) z + β1 x, it then makes ``1 − β1 (1 − c)`` of the change:
(1 − β1) of it, and β1 of the c that x takes. Of a convex set the average is in the set too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from prodigyplus import averaging

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

    def hold_(self, p: Tensor, state: Mapping[str, Tensor], xy: Tensor) -> None:
        """Put a parameter and its base iterate, which a step has moved, back into the set.

        Args:
            p: The parameter, which holds y; a DTensor, if its state is.
            state: Its state.
            xy: ``1 − β1 (1 − c)`` of the step; 0-dim.
        """
        before = p.detach().clone() if averaging.OFFSET in state else p
        if averaging.is_averaged(state):
            z = averaging.base_iterate(p.detach(), state)
            moved = self.projected(z)
            change = local(moved) - local(z)
            local(p).add_(change * xy.to(change))
        p.copy_(self.projected(p))
        if averaging.BASE in state:
            local(state[averaging.BASE]).add_(change)
        elif averaging.OFFSET in state:
            local(state[averaging.OFFSET]).add_(change - (local(p) - local(before)))


def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that is here, sharing its memory."""
    piece: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return piece
