"""Stacks: small tensors of one shape as one tensor, (count, *shape), so that one operator serves all.

On a small tensor an operator costs little more than its call, so a thousand biases cost a thousand calls of
each operator. Stacked, they cost one. A single tensor is a stack of one: a view, with no copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prodigyplus.torch_private import foreach_copy_


def stack_copy(tensors: list[Tensor]) -> Tensor:
    """Stack tensors to (count, *shape): several are copied, a single one becomes a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def unstack_(tensors: list[Tensor], values: Tensor) -> None:
    """Write a stack from :func:`stack_copy` back to its tensors; nothing to do for a single one, a view."""
    if len(tensors) > 1:
        foreach_copy_(tensors, values.unbind())


def stack_view(tensors: list[Tensor]) -> Tensor:
    """Stack tensors to (count, *shape); the first call moves them into one storage, so that later ones copy
    nothing.

    For state, whose location in memory matters to nobody else. If other tensors lie in the same storages, the
    stack remains a copy; in any case, give it to :func:`write_back_` when it has changed.
    """
    first, count = tensors[0], len(tensors)
    if count == 1:
        return first.unsqueeze(0)
    if _are_consecutive(tensors):
        strides = (first.numel(), *first.stride())
        return first.as_strided((count, *first.shape), strides, first.storage_offset())
    stack = torch.stack(tensors)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    # Only if nothing else lies in their storages: tensors left behind would keep the old storage alive.
    if sum(storages.values()) == stack.nbytes:
        for tensor, row in zip(tensors, stack.unbind(), strict=True):
            # The tensor object stays the same, since others refer to it, and its memory becomes a row of the
            # stack: the next step needs no copy.
            tensor.set_(row)  # type: ignore[call-overload]
    return stack


def _are_consecutive(tensors: list[Tensor]) -> bool:
    """Whether tensors of one shape lie in one storage, each starting where the previous one ends."""
    first, size = tensors[0], tensors[0].nbytes
    start, storage = first.data_ptr(), first.untyped_storage()
    end = start + size * len(tensors)
    # This runs for every parameter at every step, so by map(), without a line of Python for each. A tensor
    # that begins within a storage lies in it.
    return (
        list(map(Tensor.data_ptr, tensors)) == list(range(start, end, size or 1))
        and end <= storage.data_ptr() + storage.nbytes()
        and (all(map(Tensor.is_contiguous, tensors)) or len(set(map(Tensor.stride, tensors))) == 1)
    )


def write_back_(tensors: list[Tensor], values: Tensor) -> None:
    """Write a stack from :func:`stack_view` back to its tensors, if it was a copy."""
    if tensors[0].data_ptr() != values.data_ptr():
        unstack_(tensors, values)


def total(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of each tensor of a stack; shape (count,)."""
    return values.reshape(len(values), -1).sum(1, dtype=dtype)


def square_total(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of squares of each tensor of a stack, computed and returned in ``dtype``; shape (count,)."""
    if values.ndim == 1:
        values = values.unsqueeze(1)
    # A norm along a long last dimension is much faster than one over all dimensions.
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=dtype)
    return norms.reshape(len(values), -1).square_().sum(1)


def across(numbers: Tensor, values: Tensor) -> Tensor:
    """``numbers``, one for each tensor of the stack ``values``, (count,), reshaped to broadcast over it."""
    return numbers.view(-1, *(1,) * (values.ndim - 1))
