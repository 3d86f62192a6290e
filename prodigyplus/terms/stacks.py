"""Stacks: small tensors of one shape as one tensor, (count, *shape), so that one operator serves all.

An operator on a small tensor costs its call and little else, so a thousand biases cost a thousand calls of
each. Stacked, they cost one. A single tensor is a stack of one, which is a view and copies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prodigyplus.torch_private import foreach_copy_


def stack_copy(tensors: list[Tensor]) -> Tensor:
    """The stack of tensors, (count, *shape): of several a copy, of a single one a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def unstack_(tensors: list[Tensor], values: Tensor) -> None:
    """Write the stack that :func:`stack_copy` gave back to its tensors; of a single one it is a view."""
    if len(tensors) > 1:
        foreach_copy_(tensors, values.unbind())


def stack_view(tensors: list[Tensor]) -> Tensor:
    """The stack of tensors, (count, *shape), which from the first call on lies where they lie.

    For state, of which nobody else cares where it lies. Where only some of the tensors that share a storage
    are asked for, it is a copy, to be given to :func:`write_back_`.
    """
    first, count = tensors[0], len(tensors)
    if count == 1:
        return first.unsqueeze(0)
    if _are_consecutive(tensors):
        strides = (first.numel(), *first.stride())
        return first.as_strided((count, *first.shape), strides, first.storage_offset())
    stack = torch.stack(tensors)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    # Only if nothing else lies in their storages: those left behind would keep the old storage alive.
    if sum(storages.values()) == stack.nbytes:
        for tensor, row in zip(tensors, stack.unbind(), strict=True):
            # The tensor object stays what others refer to, and its memory is now a row of the stack: the next
            # step finds the stack without a copy.
            tensor.set_(row)  # type: ignore[call-overload]
    return stack


def _are_consecutive(tensors: list[Tensor]) -> bool:
    """Whether tensors of one shape lie in one storage, each where the one before it ends."""
    first, size = tensors[0], tensors[0].nbytes
    start, storage = first.data_ptr(), first.untyped_storage()
    end = start + size * len(tensors)
    # For every parameter at every step: by map, which asks a thousand without a line of Python for each. A
    # tensor that begins within a storage lies in it.
    return (
        list(map(Tensor.data_ptr, tensors)) == list(range(start, end, size or 1))
        and end <= storage.data_ptr() + storage.nbytes()
        and (all(map(Tensor.is_contiguous, tensors)) or len(set(map(Tensor.stride, tensors))) == 1)
    )


def write_back_(tensors: list[Tensor], values: Tensor) -> None:
    """Write the stack that :func:`stack_view` gave back to its tensors, if it was a copy."""
    if tensors[0].data_ptr() != values.data_ptr():
        unstack_(tensors, values)


def total(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of each tensor of a stack; shape (count,)."""
    return values.reshape(len(values), -1).sum(1, dtype=dtype)


def square_total(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of the squares of each tensor of a stack, in ``dtype``, which it is computed in; (count,)."""
    if values.ndim == 1:
        values = values.unsqueeze(1)
    # A norm along a long last dimension is much faster than one over all.
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=dtype)
    return norms.reshape(len(values), -1).square_().sum(1)


def across(numbers: Tensor, values: Tensor) -> Tensor:
    """A number for each tensor of the stack ``values``, (count,), in a shape that broadcasts over it."""
    return numbers.view(-1, *(1,) * (values.ndim - 1))
