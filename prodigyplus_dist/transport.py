"""Send tensors of any sizes among the ranks of a process group: from each to each, or from one to all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from prodigyplus.torch_private import foreach_copy_
from prodigyplus_dist import torch_private

Shape = Sequence[int]


def group_across(
    axes: Sequence[dist.ProcessGroup], ranks: Sequence[int], device: torch.device, *, callers: int
) -> dist.ProcessGroup | None:
    """Find or make the process group of the ranks along several mesh axes; None for a single rank.

    All ranks of the group call it together.

    Args:
        axes: The process groups along each of the axes.
        ranks: The global ranks along all of them, ascending.
        device: The device of the tensors that will be sent.
        callers: How many ranks call it, each for its own group. If the whole job does, the group is a new
            one, in which large messages do not delay other traffic. Otherwise an existing group is preferred:
            to make one, NCCL may need the ranks that do not call.
    """
    if len(ranks) <= 1:
        return None
    world = dist.group.WORLD
    assert world is not None
    for group in () if callers == world.size() else (*axes, world):
        if dist.get_process_group_ranks(group) == list(ranks):
            return group
    groups = _GROUPS_MADE.setdefault(world, {})
    if tuple(ranks) not in groups:
        groups[tuple(ranks)] = _new_group(axes, ranks, device)
    return groups[tuple(ranks)]


# By the default group, with which they are dropped; shared by all optimisers of a job.
_GROUPS_MADE: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = (
    WeakKeyDictionary()
)


def _new_group(
    axes: Sequence[dist.ProcessGroup], ranks: Sequence[int], device: torch.device
) -> dist.ProcessGroup:
    # torch names a new group after the number of groups that the rank is in, so all have to be in as many.
    count = torch_private.groups_of_this_rank()
    highest = torch.tensor(count, device=device)
    for group in axes:
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    for _ in range(int(highest) - count):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
    # The timeout of the groups it is made from; torch's default is half an hour.
    timeout = torch_private.timeout_of(axes[0], device)
    new_group: dist.ProcessGroup = dist.new_group(list(ranks), timeout, use_local_synchronization=True)
    # NCCL needs a collective before the first point-to-point message.
    dist.all_reduce(highest, group=new_group)
    return new_group


def swap(
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Shape]],
    group: dist.ProcessGroup | None,
    group_rank: int,
    *,
    like: Tensor,
    all_to_all: bool,
) -> Callable[[], list[list[Tensor]]]:
    """Begin to send tensors to each rank of a group, and to receive tensors from each.

    Args:
        outgoing: For each rank the tensors to send to it, of any dtype; they are copied at once.
        incoming: For each rank the shapes of the tensors that come from it.
        group: The ranks. None if this rank sends to itself only; then there is no communication.
        group_rank: This rank's rank in the group.
        like: A tensor of the dtype and on the device to send in.
        all_to_all: Send in one all-to-all. False: point to point.

    Returns:
        A function that waits for the tensors from each rank and returns them: views of one buffer, in the
        dtype of ``like``.
    """
    counts = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    sent = packed([tensor for tensors in outgoing for tensor in tensors], like)
    sizes = [sum(map(math.prod, shapes)) for shapes in incoming]
    received = sent if group is None else like.new_empty(sum(sizes))
    to_ranks, from_ranks = torch.split(sent, counts), torch.split(received, sizes)
    works: list[dist.Work] = []
    if group is None:
        assert counts == sizes
    elif all_to_all:
        works = [dist.all_to_all_single(received, sent, sizes, counts, group=group, async_op=True)]
    else:
        from_ranks[group_rank].copy_(to_ranks[group_rank])
        operations = [
            dist.P2POp(operation, buffer, group=group, group_peer=peer)
            for operation, buffers in ((dist.isend, to_ranks), (dist.irecv, from_ranks))
            for peer, buffer in enumerate(buffers)
            if peer != group_rank and buffer.numel()
        ]
        if operations:
            works = dist.batch_isend_irecv(operations)

    def wait() -> list[list[Tensor]]:
        nonlocal sent, to_ranks
        for work in works:
            work.wait()
        del sent, to_ranks  # kept alive until they have been sent
        return [unpacked(buffer, shapes) for buffer, shapes in zip(from_ranks, incoming, strict=True)]

    return wait


def broadcast(
    tensors: Sequence[Tensor], shapes: Sequence[Shape], source: int, group: dist.ProcessGroup, like: Tensor
) -> Callable[[], list[Tensor]]:
    """Begin to send tensors from one rank of a group to all others, in one broadcast.

    Args:
        tensors: On the source, the tensors, of any dtype; elsewhere empty.
        shapes: The shapes of the tensors, on all ranks.
        source: The global rank to send from.
        group: The ranks.
        like: A tensor of the dtype and on the device to send in.

    Returns:
        A function that waits for the tensors and returns them: views of one buffer, in the dtype of ``like``.
    """
    buffer = packed(tensors, like) if tensors else like.new_empty(sum(map(math.prod, shapes)))
    work = dist.broadcast(buffer, source, group=group, async_op=True)

    def wait() -> list[Tensor]:
        work.wait()
        return unpacked(buffer, shapes)

    return wait


def packed(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """All elements of the tensors in one new tensor of one dimension, of the dtype and device of ``like``."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    buffer = like.new_empty(sum(tensor.numel() for tensor in tensors))
    if tensors:
        foreach_copy_(unpacked(buffer, [tensor.shape for tensor in tensors]), tensors)
    return buffer


def unpacked(buffer: Tensor, shapes: Iterable[Shape]) -> list[Tensor]:
    """Views, of these shapes, of a buffer from :func:`packed`."""
    shapes = list(shapes)
    pieces = torch.split(buffer, [math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
