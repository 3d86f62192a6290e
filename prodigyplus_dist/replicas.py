"""Check that ranks agree where they have to: on copies of tensors bit for bit, on numbers and on options.

An item is a value that must be equal on n ranks, each of which hashes it to 64 bits. The first rank adds its
hash n − 1 times, each other rank subtracts its own once: the sum over all ranks is zero if the hashes are
equal, and otherwise almost never. So is a sum over many items, each multiplied by a factor of its own. One
all-reduce over the whole job therefore compares everything, whatever the meshes are; ranks with different
items cannot hang in it; and every rank gets the answer. Only if items differ do ranks gather which, and
how.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from prodigyplus import checkpoint, options
from prodigyplus.optimizer import ProdigyPlusScheduleFree
from prodigyplus.placement import name_of
from prodigyplus.terms.isolation import isolated
from prodigyplus_dist import torch_private
from prodigyplus_dist.exchange import MeshExchange
from prodigyplus_dist.layout import shard_dim
from prodigyplus_dist.placement import MeshTensors

Ranks = tuple[int, ...]
"""Global ranks, ascending."""

# The number of bins that items are summed in: few nonzero bins leave few items to report. The first is
# for structure (which items there are): where ranks differ in that, nothing else can be compared.
_BINS = 1024
_STRUCTURE = 0

# How many differences a message lists, and of each how many values and ranks.
_LISTED = 10

# How many elements are hashed at a time.
_CHUNK = 1 << 19

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators"): its increment, then
# the shift and the factor of each round of mixing.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))


class _Item(NamedTuple):
    """A value that has to be equal on some ranks, this one among them."""

    label: str
    ranks: Ranks
    value: Tensor | str  # a local tensor, or a text
    is_structure: bool = False

    @property
    def bin(self) -> int:
        return _STRUCTURE if self.is_structure else 1 + _hash(self.label) % (_BINS - 1)

    @property
    def factor(self) -> int:
        """An odd factor for the hash, so that differences in two items do not cancel."""
        # A tuple of integers has the same hash in every process; a string does not.
        return _hash(f"{self.label}\n{hash(self.ranks)}") | 1

    def text(self, bits: int) -> str:
        """The value as a message shows it; ``bits`` is its hash."""
        if isinstance(self.value, str):
            return self.value
        return (f"{self.value.item()}, " if self.value.numel() == 1 else "") + f"hash {bits % (1 << 64):016x}"


@isolated
def check_replicas(optimizer: ProdigyPlusScheduleFree, replicas: dist.ProcessGroup | None = None) -> None:
    """Check that ranks agree: between any two steps, in either mode, called by all ranks together.

    - Weights and state are equal to the bit on all ranks that hold copies of them: along every mesh axis that
      does not shard a DTensor, and on all ``replicas``.
    - A parameter's shape, dtype, placements and kinds of state are equal on all ranks that hold it, shard or
      copy.
    - Options and numbers of every group (``d``, the counts of steps and the others of
      :mod:`prodigyplus.terms.group_numbers`) are equal on all ranks that share a mesh, replicas or the
      optimiser's ``process_group``.

    This costs one all-reduce of 8 KiB over the default process group, one wait for the device at the end, and
    one read of all tensors that have copies, with 12 MiB of temporary memory. It changes nothing. If some
    ranks differ, all ranks also gather objects, to report how.

    Args:
        optimizer: The optimiser of this rank. Every rank of the default process group has one; without such a
            group there is nothing to compare.
        replicas: The ranks that hold copies of plain tensors, and of DTensors whose mesh shares only one rank
            with them (in a job with ``fsdp`` and ``tp``, ``mesh["tp"].get_group()`` for parameters on
            ``mesh["fsdp"]`` alone). None: the optimiser's ``replicas``; without them, plain tensors have
            copies on all ranks, or no copies if all ranks are in the optimiser's ``process_group``, since
            these hold other tensors.

    Raises:
        RuntimeError: On all ranks. Some ranks differ: the message says which, and in what. Or some rank
            cannot compare, because a backward pass has updated parameters (``fused_back_pass=True``) and
            ``step()`` has not ended that step, or because ``replicas`` has to be given.
    """
    if not dist.is_initialized():
        optimizer._check_no_step_is_under_way()
        return
    problem, items = "", []
    try:
        optimizer._check_no_step_is_under_way()
        items = [item for item in _items(optimizer, replicas) if len(item.ranks) > 1]
    except Exception as error:  # the other ranks, which wait in the all-reduce, must learn of it
        problem = str(error) or type(error).__name__
    hashes = _hashes(items)
    # On the device that the default group uses, which is the same also on ranks without parameters.
    sums = _sums(items, hashes).to(torch_private.object_device())
    sums[_STRUCTURE] += bool(problem)
    dist.all_reduce(sums)
    differing = [bin_ for bin_, total in enumerate(sums.tolist()) if total]
    if not differing:
        return

    if differing[0] == _STRUCTURE:
        differing = [_STRUCTURE]
    found = [
        (item.label, item.ranks, item.text(bits))
        for item, bits in zip(items, hashes.tolist(), strict=True)
        if item.bin in differing[:_LISTED]
    ]
    by_rank = [(problem, found)] * dist.get_world_size()
    dist.all_gather_object(by_rank, (problem, found))
    lines = [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(by_rank) if problem]
    lines = lines or _differences([found for _, found in by_rank])
    if more := len(lines[_LISTED:]) + len(differing[_LISTED:]):
        lines[_LISTED:] = [f"and at least {more} more"]
    raise RuntimeError("\n  ".join(["ranks that have to agree do not:", *lines]))


def _items(optimizer: ProdigyPlusScheduleFree, replicas: dist.ProcessGroup | None) -> Iterator[_Item]:
    exchange, groups = optimizer._exchange, optimizer.param_groups
    stages = exchange.process_group if isinstance(exchange, MeshExchange) else None
    if isinstance(optimizer._placement, MeshTensors):
        replicas = replicas or optimizer._placement.replicas
    sharing = set() if stages is None else {_ranks(stages)}  # sets of ranks that have equal param_groups
    for index, group in enumerate(groups):
        for in_group, p in enumerate(group["params"]):
            name, state = name_of(group, index, in_group), optimizer.state.get(p, {})
            holders = _holders(p, replicas, stages)
            sharing |= holders
            for ranks in holders:
                yield _Item(name, ranks, _description(p, state), is_structure=True)
                yield _Item(f"the weights of {name}", _copies(p, ranks), optimizer._placement.local(p))
                for key, value in state.items():
                    # Prodigy's samples are plain tensors, but sharded as their parameter is.
                    copies = _copies(value if isinstance(value, DTensor) else p, ranks)
                    yield _Item(f"state {key!r} of {name}", copies, optimizer._placement.local(value))
    for ranks in sharing:
        yield _Item("param_groups", ranks, f"{len(groups)} of them", is_structure=True)
        for index, group in enumerate(groups):
            for name in (*options.NAMES, *checkpoint.KEYS):
                value = group[name] if isinstance(group[name], Tensor) else repr(group[name])
                yield _Item(f"{name!r} of param_groups[{index}]", ranks, value)


def _description(p: Tensor, state: Mapping[str, Tensor]) -> str:
    where = f" in placements {p.placements}" if isinstance(p, DTensor) else ""
    keys = ", ".join(f"{key!r} ({value.dtype})" for key, value in sorted(state.items()))
    frozen = "" if p.requires_grad else "frozen, "
    return f"{frozen}{p.dtype} of shape {tuple(p.shape)}{where}, {f'state {keys}' if keys else 'no state'}"


def _holders(p: Tensor, replicas: dist.ProcessGroup | None, stages: dist.ProcessGroup | None) -> set[Ranks]:
    """The sets of ranks that hold a parameter, shard or copy: those of its mesh, and its replicas.

    Args:
        p: The parameter.
        replicas: The ranks that hold copies of parameters whose mesh, if any, does not span them; if known.
        stages: The ranks that hold other parameters of the same run, if there are any.
    """
    if isinstance(p, DTensor):
        mesh = _ranks(p.device_mesh.mesh)
        is_across = replicas is None or len({*mesh} & {*_ranks(replicas)}) > 1
        return {mesh} if is_across else {mesh, _ranks(replicas)}
    if replicas is not None or stages is None:
        return {_ranks(replicas)}
    if stages.size() < dist.get_world_size():
        raise ValueError(
            "some ranks are outside the optimiser's process_group, so it is unknown which ranks hold copies "
            "of its plain tensors: pass the group of those ranks as replicas, here or to the optimiser."
        )
    return {(dist.get_rank(),)}


def _copies(tensor: Tensor, holders: Ranks) -> Ranks:
    """The ranks among the holders of a tensor that hold the same piece as this rank."""
    if not isinstance(tensor, DTensor) or holders != _ranks(tensor.device_mesh.mesh):
        return holders
    index: list[int | slice] = list(tensor.device_mesh.get_coordinate() or ())
    for axis, placement in enumerate(tensor.placements):
        if shard_dim(placement, tensor.ndim) is None:
            index[axis] = slice(None)
    return _ranks(tensor.device_mesh.mesh[tuple(index)])


def _ranks(holders: Tensor | dist.ProcessGroup | None) -> Ranks:
    """The ranks of a mesh, given as a tensor, or of a process group; None: of the default group."""
    if isinstance(holders, Tensor):
        return tuple(sorted(holders.flatten().tolist()))
    return tuple(sorted(dist.get_process_group_ranks(holders)))


def _hashes(items: Sequence[_Item]) -> Tensor:
    """The hashes of all items, shape (items,), int64, on the first tensor's device; waits for nothing."""
    tensors = {index: e.value for index, e in enumerate(items) if isinstance(e.value, Tensor)}
    device = next((tensor.device for tensor in tensors.values()), "cpu")
    texts = ["" if isinstance(item.value, Tensor) else item.value for item in items]
    hashes = torch.tensor([_hash(text) for text in texts], dtype=torch.int64, device="cpu").to(
        device, non_blocking=True
    )
    for index, tensor in tensors.items():
        hashes[index] = _hash_of_bits(tensor)
    return hashes


def _sums(items: Sequence[_Item], hashes: Tensor) -> Tensor:
    """Sums by bin, which add up to zero over all ranks if these agree; shape (bins,), int64."""
    rank = dist.get_rank()
    columns = (
        [len(item.ranks) - 1 if rank == item.ranks[0] else -1 for item in items],
        [item.factor for item in items],
        [item.bin for item in items],
    )
    shares, factors, bins = (
        torch.tensor(column, dtype=torch.int64, device="cpu").to(hashes.device) for column in columns
    )
    return hashes.new_zeros(_BINS).index_add_(0, bins, hashes * factors * shares)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _hash_of_bits(tensor: Tensor) -> Tensor:
    """A hash of the bits of all elements in row-major order; 0-dim, int64."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    start = 1
    for chunk in _chunks(tensor):
        end = start + chunk.numel()
        words = torch.arange(start, end, device=tensor.device).mul_(_GOLDEN)
        words += chunk.view(_INTEGERS[chunk.element_size()])
        for shift, factor in _ROUNDS:
            # A logical shift; torch's >> is arithmetic.
            words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
        total += words.sum()
        start = end
    return total


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements in row-major order, in one-dimensional chunks, whatever its strides."""
    if tensor.numel() <= _CHUNK:
        yield tensor.reshape(-1)
        return
    outermost = next(dim for dim, size in enumerate(tensor.shape) if size > 1)
    for half in tensor.tensor_split(2, outermost):
        yield from _chunks(half)


def _differences(by_rank: Sequence[Sequence[tuple[str, Ranks, str]]]) -> list[str]:
    """A line for each item that differs, from the (label, ranks, text) of the items of each rank."""
    values: dict[tuple[str, Ranks], dict[int, str]] = defaultdict(dict)
    for rank, found in enumerate(by_rank):
        for label, ranks, value in found:
            values[label, ranks][rank] = value
    lines = []
    for (label, ranks), by_holder in values.items():
        holders: dict[str, list[str]] = defaultdict(list)
        for rank in ranks:
            holders[by_holder.get(rank, "nothing")].append(str(rank))
        if len(holders) > 1:  # the minority first
            parts = sorted(holders.items(), key=lambda part: len(part[1]))
            lines.append(
                f"{label}: " + _some([f"rank {_some(ranks, ', ')}: {v}" for v, ranks in parts], "; ")
            )
    return lines


def _some(texts: Sequence[str], separator: str) -> str:
    return separator.join([*texts[:_LISTED], *["…"] * (len(texts) > _LISTED)])
