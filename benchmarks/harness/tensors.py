"""What tensors hold, and parameters with gradients to hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def nbytes(value: Any) -> int:
    """The bytes of a tensor, or of those in a tree; they need no storage."""
    return sum(tensor.numel() * tensor.element_size() for tensor in leaves(value))


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors in a tree of dicts, lists and tuples."""
    yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each storage of tensors, each counted once and whole: tensors may share one."""
    kept = (local(tensor).untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in kept}


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of state that an optimiser keeps for its parameters, in this process."""
    return sum(storages(leaves([*optimizer.state.values()])).values())


def with_gradients(
    shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[nn.Parameter]:
    """Weights, with gradients."""
    made = [nn.Parameter(torch.randn(*shape, device=device).mul_(0.02).to(dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p).mul_(1e-2)
    return made
