"""Where the tensors of an optimiser lie: whole in this process, or in pieces on a mesh.

Apart from formulas and sums, all code asks a :class:`Placement` which part of a tensor is on this rank, how
an entry of the state is kept and saved, and which parameters take part in a step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from prodigyplus import torch_private
from prodigyplus.terms.layout import Layout

_GRAD = operator.attrgetter("grad")


class Placement(Protocol):
    """What an optimiser asks about its tensors; see :class:`WholeTensors`."""

    def local(self, tensor: Tensor) -> Tensor:
        """The local piece of a parameter, a gradient or an entry of the state, sharing its memory."""
        ...

    def locals(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """:meth:`local` of many."""
        ...

    def layout(self, p: Tensor) -> Layout:
        """Where the local piece of a parameter lies in the whole; the same object for the same layout."""
        ...

    def store(self, p: Tensor, local: Tensor, key: str, slice_p: int) -> Tensor:
        """An entry of a parameter's state as it is kept and saved, from its local piece.

        Args:
            p: The parameter.
            local: The local piece of the entry; samples as rows.
            key: The entry's name in :data:`prodigyplus.state_table.TABLE`.
            slice_p: The distance between samples.
        """
        ...

    def load(self, p: Tensor, saved: Tensor, key: str, slice_p: int) -> Tensor:
        """The local piece of a saved entry, in new memory: undoes :meth:`store` of any layout."""
        ...

    def place_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A tensor of the same shape as another, laid out as that is."""
        ...

    def takes_part(self, p: Tensor) -> bool:
        """Whether a parameter takes part in the step that begins; the same on all ranks that hold it."""
        ...

    def remember_trained(self, parameters: Iterable[Tensor]) -> None:
        """Note which of the parameters require gradients now: they take part in the next step, too."""
        ...

    def local_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """:meth:`local` of all entries of a state."""
        ...

    def gradient(
        self, location: Location, grad: Tensor | None, name: Callable[[Location], str]
    ) -> tuple[Tensor, bool | None]:
        """The gradient of a parameter that takes part; and whether it has one here (None: always).

        Args:
            location: The parameter.
            grad: Its gradient here, if it has one.
            name: Returns what to call the parameter in a message.

        Raises:
            RuntimeError: The gradient lies on another mesh than the parameter.
        """
        ...

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """The local gradients; None if any parameter has none here, or one that is laid out differently."""
        ...

    def check(self, p: Tensor, name: str) -> None:
        """Refuse a parameter that cannot be trained where it lies, by what every rank knows.

        Raises:
            RuntimeError: The parameter cannot be trained.
        """
        ...

    def free_gathered(self, parameters: Iterable[Tensor]) -> None:
        """Free whole copies that FSDP2 has gathered of parameters whose values have changed."""
        ...


class WholeTensors:
    """Parameters that are plain tensors, whole in this process."""

    def __init__(self) -> None:
        # Cached: a layout may cache where its samples are, and parameters of one layout move together.
        self._layouts: dict[Hashable, Layout] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_layouts": {}}  # a copy makes its own: keys may be valid in this process only

    def local(self, tensor: Tensor) -> Tensor:
        return tensor

    def locals(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return list(tensors)

    def layout(self, p: Tensor) -> Layout:
        layout = self._layouts.get(p.shape)
        if layout is None:
            layout = self._layouts[p.shape] = Layout(tuple(p.shape))
        return layout

    def store(self, p: Tensor, local: Tensor, key: str, slice_p: int) -> Tensor:
        return local

    def load(self, p: Tensor, saved: Tensor, key: str, slice_p: int) -> Tensor:
        if hasattr(saved, "full_tensor"):  # a DTensor, saved by the sharded optimiser
            saved = saved.full_tensor()
        return saved.to(p.device, copy=True)

    def place_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor

    def takes_part(self, p: Tensor) -> bool:
        return p.grad is not None

    def remember_trained(self, parameters: Iterable[Tensor]) -> None:
        pass

    def local_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def gradient(
        self, location: Location, grad: Tensor | None, name: Callable[[Location], str]
    ) -> tuple[Tensor, bool | None]:
        assert grad is not None
        return grad, None

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        grads = list(map(_GRAD, parameters))
        return None if type(None) in map(type, grads) else grads  # without a line of Python for each

    def check(self, p: Tensor, name: str) -> None:
        if torch_private.is_fsdp1_parameter(p):
            raise RuntimeError(
                f"{name} is a flat parameter of FSDP1, which has lost the shapes of the tensors "
                "in it: shard the model with FSDP2's fully_shard instead."
            )
        if hasattr(p, "placements"):
            raise RuntimeError(
                f"{name} is a DTensor, a piece of a sharded parameter: use ShardedProdigyPlusScheduleFree "
                "(from prodigyplus_dist)."
            )

    def free_gathered(self, parameters: Iterable[Tensor]) -> None:
        pass


class Location(NamedTuple):
    """The place of a parameter in its optimiser.

    Args:
        p: The parameter.
        group: The index of its group.
        in_group: The index of the parameter in the group.
        ordinal: Its place among the parameters of all groups, from 1; seeds the noise of its rounding.
    """

    p: Tensor
    group: int
    in_group: int
    ordinal: int

    def name_in(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """What to call the parameter in a message; see :func:`name_of`."""
        return name_of(groups[self.group], self.group, self.in_group)


def locations(groups: Sequence[Mapping[str, Any]]) -> list[Location]:
    """The parameters of ``param_groups`` in their order; one that was given twice is there twice."""
    places = (
        (p, group, in_group)
        for group, param_group in enumerate(groups)
        for in_group, p in enumerate(param_group["params"])
    )
    return [Location(*place, ordinal) for ordinal, place in enumerate(places, 1)]


def memory_of(local: Tensor) -> tuple[int, Hashable, Hashable, Hashable]:
    """Where a local tensor lies: its storage, and where in it; equal for two that are the same memory."""
    return local.untyped_storage().data_ptr(), local.storage_offset(), local.shape, local.stride()


def name_of(group: Mapping[str, Any], index: int, in_group: int) -> str:
    """What to call a parameter in a message: its own name if it has one, or its place.

    Args:
        group: Its group.
        index: The index of the group.
        in_group: The index of the parameter in the group.
    """
    names = group.get("param_names", ())
    if in_group < len(names):  # a parameter that was appended to the group has no name
        return f"parameter {names[in_group]!r}"
    return f"parameter {in_group} of param_groups[{index}]"
