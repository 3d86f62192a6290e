"""Small parameters of one shape, moved as one: a tensor of theirs has a dimension more, the first, for which.

An operator on a small tensor costs its call and little else, so a thousand biases cost a thousand calls of
each. Stacked, they cost one. A single parameter is a stack of one, which is a view and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def read(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, (count, *shape): of several a copy, of a single one its memory itself."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def write(tensors: Sequence[Tensor], values: Tensor) -> None:
    """Write back what :func:`read` gave, changed in place: nothing to do for a single one."""
    if len(tensors) > 1:
        torch._foreach_copy_(list(tensors), values.unbind())


def share(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, (count, *shape), in whose memory they are, from the first time on.

    For what is kept from step to step and of which nobody cares where it is. Of a part of those that share a
    memory it is a copy, to be given to :func:`keep`: they stay with the others, or the memory of all would be
    held by those left behind.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first.unsqueeze(0)
    memory, where = first.untyped_storage().data_ptr(), first.data_ptr()
    if all(
        tensor.data_ptr() == where + place * first.nbytes
        and tensor.untyped_storage().data_ptr() == memory
        and tensor.stride() == first.stride()
        for place, tensor in enumerate(tensors)
    ):
        strides = (first.numel(), *first.stride())
        return first.as_strided((len(tensors), *first.shape), strides, first.storage_offset())
    together = torch.stack(list(tensors))
    memories = {memory.data_ptr(): memory.nbytes() for memory in (t.untyped_storage() for t in tensors)}
    if sum(memories.values()) == together.nbytes:  # nothing else is in them
        for tensor, its in zip(tensors, together.unbind(), strict=True):
            tensor.set_(its)  # type: ignore[call-overload]
    return together


def keep(tensors: Sequence[Tensor], values: Tensor) -> None:
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
