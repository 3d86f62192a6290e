"""Send tensors of any sizes among the ranks of a process group: to each its own, or one's to all."""

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
    """The process group of the ranks along several mesh axes; None of one rank.

    Those ranks call it together.

    Args:
        axes: The groups along each of the axes.
        ranks: The global ranks along all of them, ascending.
        device: That of what will be sent.
        callers: How many ranks call it, for groups of theirs. If all of the job do, it is a group of our own,
            in which megabytes hold up no one else. Otherwise one that is there already, if there is one: to
            make one, NCCL may need the others.
    """
    if len(ranks) <= 1:
        return None
    world = dist.group.WORLD
    assert world is not None
    for group in () if callers == world.size() else (*axes, world):
        if dist.get_process_group_ranks(group) == list(ranks):
            return group
    made = _made.setdefault(world, {})
    if tuple(ranks) not in made:
        made[tuple(ranks)] = _new_group(axes, ranks, device)
    return made[tuple(ranks)]


# By the world they are of, with which they go: all optimisers of a job share them.
_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = WeakKeyDictionary()


def _new_group(
    axes: Sequence[dist.ProcessGroup], ranks: Sequence[int], device: torch.device
) -> dist.ProcessGroup:
    # torch names the new group by the number of groups that a rank is in, by which the others look for it.
    count = torch_private.groups_of_this_rank()
    highest = torch.tensor(count, device=device)
    for group in axes:
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    for _ in range(int(highest) - count):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
    # As patient as those it is made of; torch's default is half an hour.
    timeout = torch_private.timeout_of(axes[0], device)
    made: dist.ProcessGroup = dist.new_group(list(ranks), timeout, use_local_synchronization=True)
    # What NCCL sends point to point needs a collective before it.
    dist.all_reduce(highest, group=made)
    return made


def swap(
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Shape]],
    group: dist.ProcessGroup | None,
    place: int,
    *,
    like: Tensor,
    all_to_all: bool,
) -> Callable[[], list[list[Tensor]]]:
    """Begin to send to each rank of a group what is for it, and to receive what each has for this one.

    Args:
        outgoing: What goes to each, of any dtype. It is copied at once.
        incoming: The shapes of what comes from each.
        group: The ranks. None where each has something for itself only, and nothing is sent.
        place: The number of this rank among them.
        like: A tensor of the dtype and on the device to send in.
        all_to_all: In one all-to-all. False: point to point.

    Returns:
        What waits for what came from each rank, and gives it.
    """
    counts = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    sent = packed([tensor for tensors in outgoing for tensor in tensors], like)
    sizes = [sum(map(math.prod, shapes)) for shapes in incoming]
    received = sent if group is None else like.new_empty(sum(sizes))
    to, of = torch.split(sent, counts), torch.split(received, sizes)
    works: list[dist.Work] = []
    if group is None:
        assert counts == sizes
    elif all_to_all:
        works = [dist.all_to_all_single(received, sent, sizes, counts, group=group, async_op=True)]
    else:
        of[place].copy_(to[place])
        operations = [
            dist.P2POp(operation, buffer, group=group, group_peer=peer)
            for operation, buffers in ((dist.isend, to), (dist.irecv, of))
            for peer, buffer in enumerate(buffers)
            if peer != place and buffer.numel()
        ]
        if operations:
            works = dist.batch_isend_irecv(operations)

    def wait() -> list[list[Tensor]]:
        nonlocal sent, to
        for work in works:
            work.wait()
        del sent, to  # kept until here, where they have been sent
        return [unpacked(buffer, shapes) for buffer, shapes in zip(of, incoming, strict=True)]

    return wait


def share(
    tensors: Sequence[Tensor], shapes: Sequence[Shape], source: int, group: dist.ProcessGroup, like: Tensor
) -> Callable[[], list[Tensor]]:
    """Begin to give all ranks of a group what one of them has.

    Args:
        tensors: It, on the rank that has it.
        shapes: Its shapes.
        source: The global rank that has it.
        group: The ranks.
        like: A tensor of the dtype and on the device to send in.

    Returns:
        What waits for it, and gives it.
    """
    buffer = packed(tensors, like) if tensors else like.new_empty(sum(map(math.prod, shapes)))
    work = dist.broadcast(buffer, source, group=group, async_op=True)

    def wait() -> list[Tensor]:
        work.wait()
        return unpacked(buffer, shapes)

    return wait


def packed(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """All elements in one dimension, in the dtype and on the device of ``like``."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    buffer = like.new_empty(sum(tensor.numel() for tensor in tensors))
    if tensors:
        foreach_copy_(unpacked(buffer, [tensor.shape for tensor in tensors]), tensors)
    return buffer


def unpacked(buffer: Tensor, shapes: Iterable[Shape]) -> list[Tensor]:
    """Views of what was packed, in their shapes."""
    shapes = list(shapes)
    pieces = torch.split(buffer, [math.prod(shape) for shape in shapes])
    return [piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)]
