"""What operator calls move: bytes between ranks, and bytes of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from watching import Call, Watch

from harness.tensors import leaves, nbytes

__all__ = ["Call", "Watch", "collective", "moved"]

# ------------------------------------------------------------------------------------ between ranks


def collective(call: Call) -> tuple[str, float] | None:
    """The kind of a collective, and the bytes that this rank sends in it; None if a call is none.

    Raises:
        KeyError: It is one whose bytes are not defined here.
    """
    if call.func.namespace not in ("c10d", "_c10d_functional", "_dtensor") or call.name in _NOTHING_SENT:
        return None
    return _SENT[call.name](*call.args)


def _group_of(group: Any) -> dist.ProcessGroup:
    """The process group in a collective's arguments: a boxed one, or its name."""
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _ring(kind: str, whole: int, group: Any, *, times: int = 1) -> tuple[str, float]:
    """What a rank sends in a ring of a tensor that has so many bytes when it is whole."""
    size = _group_of(group).size()
    return kind, times * whole * (size - 1) / size


def _rooted(kind: str, sent: int, group: Any, *, sends: bool) -> tuple[str, float]:
    """What a rank sends to or from a root."""
    return kind, sent if sends and _group_of(group).size() > 1 else 0


def _scattered(inputs: Sequence[Any], group: Any) -> tuple[str, float]:
    """What the root sends of pieces: all but its own."""
    pieces = [nbytes(piece) for piece in (inputs[0] if inputs else ())]
    return "scatter", sum(pieces) - (pieces[_group_of(group).rank()] if pieces else 0)


def _all_to_all(pieces: Sequence[int], group: Any) -> tuple[str, float]:
    """What a rank sends of pieces of these sizes in bytes: all but its own."""
    return "all-to-all", sum(pieces) - pieces[_group_of(group).rank()]


def _split(tensor: Tensor, splits: Sequence[int], group: Any) -> list[int]:
    """The bytes of the pieces that a tensor is cut into; equal ones by default."""
    size = _group_of(group).size()
    if not splits:
        return [nbytes(tensor) // size] * size
    row = nbytes(tensor) // max(1, tensor.shape[0])
    return [rows * row for rows in splits]


_NOTHING_SENT = {"wait_tensor", "barrier", "mesh_get_process_group", "_wrap_tensor_autograd"}
_SENT: dict[str, Callable[..., tuple[str, float]]] = {
    "allreduce_": lambda x, group, *_: _ring("all-reduce", nbytes(x), group, times=2),
    "all_reduce": lambda x, _, group: _ring("all-reduce", nbytes(x), group, times=2),
    "all_reduce_": lambda x, _, group: _ring("all-reduce", nbytes(x), group, times=2),
    "allgather_": lambda out, _, group, *__: _ring("all-gather", nbytes(out), group),
    "_allgather_base_": lambda out, _, group, *__: _ring("all-gather", nbytes(out), group),
    "all_gather_into_tensor": lambda x, size, group: _ring("all-gather", size * nbytes(x), group),
    "all_gather_into_tensor_coalesced": lambda x, size, group: _ring("all-gather", size * nbytes(x), group),
    "reduce_scatter_": lambda _, x, group, *__: _ring("reduce-scatter", nbytes(x), group),
    "_reduce_scatter_base_": lambda _, x, group, *__: _ring("reduce-scatter", nbytes(x), group),
    "reduce_scatter_tensor": lambda x, _, __, group: _ring("reduce-scatter", nbytes(x), group),
    "broadcast_": lambda x, group, *_: _ring("broadcast", nbytes(x), group),
    "broadcast": lambda x, _, group: _ring("broadcast", nbytes(x), group),
    "gather_": lambda _, x, group, root, *__: _rooted(
        "gather", nbytes(x), group, sends=_group_of(group).rank() != root
    ),
    "scatter_": lambda _, x, group, *__: _scattered(x, group),
    "alltoall_": lambda _, x, group, *__: _all_to_all([nbytes(piece) for piece in x], group),
    "alltoall_base_": lambda _, x, group, __, splits, *___: _all_to_all(_split(x, splits, group), group),
    "all_to_all_single": lambda x, _, splits, group: _all_to_all(_split(x, splits, group), group),
    "shard_dim_alltoall": lambda x, _, __, group: _all_to_all(_split(x, (), group), group),
    "send": lambda x, group, *_: _rooted("send", nbytes(x), group, sends=True),
    "recv_": lambda x, group, *_: _rooted("receive", 0, group, sends=False),
}

# -------------------------------------------------------------------------------------- in memory

# Operations that write over their first argument without reading it.
_OVERWRITING = ("copy_", "_foreach_copy_", "zero_", "fill_")


def moved(call: Call, least: int) -> int:
    """The bytes that a call reads and writes of tensors with at least ``least`` elements.

    It reads each of its tensor arguments once and writes its results once; what it changes in place it reads
    and writes. Views move nothing, and of an expanded tensor only its memory counts.
    """
    name, schema = call.name, call.func._schema
    if any(value.alias_info and not value.alias_info.is_write for value in schema.returns):
        return 0  # a view
    total = 0
    makes_only = name.startswith(("new_", "empty")) or name.endswith("_like")
    for number, argument in enumerate(schema.arguments):
        given = call.args[number] if number < len(call.args) else call.kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        overwritten = written and (argument.is_out or name in _OVERWRITING)
        reads = not makes_only and not overwritten
        total += _large(given, least) * (reads + written)
    if not name.startswith(("empty", "new_empty")):
        results = call.result if isinstance(call.result, tuple) else (call.result,)
        fresh = [value.alias_info is None for value in schema.returns]
        total += _large([made for made, new in zip(results, fresh, strict=False) if new], least)
    return total


def _large(value: Any, least: int) -> int:
    """The bytes in memory of the large tensors in an argument or a result."""
    total = 0
    for tensor in leaves(value):
        dims = zip(tensor.shape, tensor.stride(), strict=True)
        numel = math.prod(size for size, stride in dims if stride)
        total += numel * tensor.element_size() if numel >= least else 0
    return total
