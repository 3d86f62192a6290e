"""Small parameters of one shape, moved as one: a tensor of theirs has a dimension more, the first, for which.

An operator on a small tensor costs its call and little else, so a thousand biases cost a thousand calls of
each. Stacked, they cost one. A single parameter is a stack of one, which is a view and copies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def read(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape as one, (count, *shape): of several a copy, of a single one its memory itself."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def write(tensors: list[Tensor], values: Tensor) -> None:
    """Write back what :func:`read` gave, changed in place: nothing to do for a single one."""
    if len(tensors) > 1:
        torch._foreach_copy_(tensors, values.unbind())


def share(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape as one, (count, *shape), in whose memory they are, from the first time on.

    For what is kept from step to step and of which nobody cares where it is. Of a part of those that share a
    memory it is a copy, to be given to :func:`keep`: they stay with the others, or the memory of all would be
    held by those left behind.
    """
    first, count = tensors[0], len(tensors)
    if count == 1:
        return first.unsqueeze(0)
    if _follow_on_one_another(tensors):
        strides = (first.numel(), *first.stride())
        return first.as_strided((count, *first.shape), strides, first.storage_offset())
    together = torch.stack(tensors)
    memories = {memory.data_ptr(): memory.nbytes() for memory in (t.untyped_storage() for t in tensors)}
    if sum(memories.values()) == together.nbytes:  # nothing else is in them
        for tensor, its in zip(tensors, together.unbind(), strict=True):
            tensor.set_(its)  # type: ignore[call-overload]
    return together


def _follow_on_one_another(tensors: list[Tensor]) -> bool:
    """Whether tensors of one shape are in one memory, each where the one before it ends."""
    first, size = tensors[0], tensors[0].nbytes
    start, memory = first.data_ptr(), first.untyped_storage()
    end = start + size * len(tensors)
    # For every parameter at every step: by map, which asks a thousand without a line of Python for each. What
    # begins within a memory is in that one.
    return (
        list(map(Tensor.data_ptr, tensors)) == list(range(start, end, size or 1))
        and end <= memory.data_ptr() + memory.nbytes()
        and (all(map(Tensor.is_contiguous, tensors)) or len(set(map(Tensor.stride, tensors))) == 1)
    )


def keep(tensors: list[Tensor], values: Tensor) -> None:
    """Write back what :func:`share` gave, changed in place, if it was a copy."""
    if tensors[0].data_ptr() != values.data_ptr():
        write(tensors, values)


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
    """A number for each tensor of a stack, (count,), in a shape to be multiplied with the stack."""
    return numbers.view(-1, *(1,) * (values.ndim - 1))
