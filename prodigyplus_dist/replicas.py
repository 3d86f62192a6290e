"""Whether ranks agree where they have to: on copies of tensors bit for bit, on numbers and on options.

What has to be equal on several ranks is an entry, of which each of them has a hash of 64 bits. The first of n
ranks takes it n − 1 times, each other takes it off once: over all ranks that is zero if they are equal, and
otherwise hardly ever. So is a sum of many entries, each times a number of its own. One all-reduce over the
whole job therefore compares everything, whatever the meshes are; ranks whose entries are unlike cannot hang
in it; and every rank has its answer. Who differs, and in what, is asked once it is known that someone does.
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
from prodigyplus_dist.layout import cut_dim

Ranks = tuple[int, ...]
"""Global ranks, ascending."""

# Sums are kept in so many bins: where few are not zero, few entries have to be looked at. What there is has
# the first: where ranks differ in that, nothing else can be compared.
_BINS = 1024
_STRUCTURE = 0

# How many differences a message tells, and of each how many values and ranks.
_TOLD = 10

# How many elements are hashed at a time.
_CHUNK = 1 << 19

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators"): its step, then of each
# round of mixing the shift and the factor.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))


class _Entry(NamedTuple):
    """What has to be equal on some ranks, of which this is one."""

    label: str
    ranks: Ranks
    value: Tensor | str  # a local tensor, or what is known without one
    is_structure: bool = False

    @property
    def bin(self) -> int:
        return _STRUCTURE if self.is_structure else 1 + _hash(self.label) % (_BINS - 1)

    @property
    def factor(self) -> int:
        """What its hash is multiplied with, lest differences in two entries cancel."""
        # A tuple of integers has the same hash in every process; a string has not.
        return _hash(f"{self.label}\n{hash(self.ranks)}") | 1

    def told(self, bits: int) -> str:
        """Its value in a message; ``bits`` is its hash."""
        if isinstance(self.value, str):
            return self.value
        return (f"{self.value.item()}, " if self.value.numel() == 1 else "") + f"hash {bits % (1 << 64):016x}"


@isolated
def check_replicas(optimizer: ProdigyPlusScheduleFree, replicas: dist.ProcessGroup | None = None) -> None:
    """Check that ranks agree: between any two steps, in either mode, called by all ranks together.

    - On all that hold copies of them, weights and state are the same to the bit: along every mesh axis that
      does not cut a DTensor, and on all ``replicas``.
    - On all that hold a parameter, shard or copy, so are its shape, dtype, placements and kinds of state.
    - On all that share a mesh, replicas or the optimiser's ``process_group``, so are the options and numbers
      of every group: ``d``, the counts of steps and the others of :mod:`prodigyplus.engine.columns`.

    Costs one all-reduce of 8 KiB over the default process group, a wait for the device at the end, and a read
    of all that has copies, in 12 MiB of memory. Changes nothing. Where ranks differ, they gather objects too.

    Args:
        optimizer: This rank's. Every rank of the default process group has one; without such a group, there
            is nothing to compare.
        replicas: The ranks that hold copies of plain tensors, and of DTensors whose mesh is across theirs (of
            what a job with ``fsdp`` and ``tp`` has on ``mesh["fsdp"]`` alone: ``mesh["tp"].get_group()``).
            None: the optimiser's own; or else, of plain tensors, all ranks; nobody if all ranks are of the
            optimiser's ``process_group``, since these hold other tensors.

    Raises:
        RuntimeError: On all ranks. They differ: the message says which, and in what. Or one of them cannot
            compare, since a backward pass has moved parameters (``fused_back_pass=True``) and no ``step()``
            has ended that step, or since it has to be told ``replicas``.
    """
    if not dist.is_initialized():
        optimizer._check_no_step_is_under_way()
        return
    problem, entries = "", []
    try:
        optimizer._check_no_step_is_under_way()
        entries = [entry for entry in _entries(optimizer, replicas) if len(entry.ranks) > 1]
    except (RuntimeError, ValueError) as error:  # of which the others, who wait, must hear
        problem = str(error)
    hashes = _hashes(entries)
    # Where the default group sends from: on all ranks the same, also on those without parameters.
    sums = _sums(entries, hashes).to(torch_private.object_device())
    sums[_STRUCTURE] += bool(problem)
    dist.all_reduce(sums)
    differing = [number for number, total in enumerate(sums.tolist()) if total]
    if not differing:
        return

    if differing[0] == _STRUCTURE:
        differing = [_STRUCTURE]
    found = [
        (entry.label, entry.ranks, entry.told(bits))
        for entry, bits in zip(entries, hashes.tolist(), strict=True)
        if entry.bin in differing[:_TOLD]
    ]
    everyone = [(problem, found)] * dist.get_world_size()
    dist.all_gather_object(everyone, (problem, found))
    lines = [f"rank {rank}: {its}" for rank, (its, _) in enumerate(everyone) if its]
    lines = lines or _differences([its for _, its in everyone])
    if more := len(lines[_TOLD:]) + len(differing[_TOLD:]):
        lines[_TOLD:] = [f"and at least {more} more"]
    raise RuntimeError("\n  ".join(["ranks that have to agree do not:", *lines]))


def _entries(optimizer: ProdigyPlusScheduleFree, replicas: dist.ProcessGroup | None) -> Iterator[_Entry]:
    exchange, groups = optimizer._exchange, optimizer.param_groups
    others = exchange._process_group if isinstance(exchange, MeshExchange) else None
    replicas = replicas or getattr(exchange, "replicas", None)
    sharing = set() if others is None else {_ranks(others)}  # the numbers of groups
    for index, group in enumerate(groups):
        for number, p in enumerate(group["params"]):
            name, state = name_of(group, index, number), optimizer.state.get(p, {})
            holders = _holders(p, replicas, others)
            sharing |= holders
            for ranks in holders:
                yield _Entry(name, ranks, _description(p, state), is_structure=True)
                yield _Entry(f"the weights of {name}", _copies(p, ranks), optimizer._placement.local(p))
                for key, value in state.items():
                    # Prodigy's samples are plain tensors, and lie where their parameter does.
                    its = _copies(value if isinstance(value, DTensor) else p, ranks)
                    yield _Entry(f"state {key!r} of {name}", its, optimizer._placement.local(value))
    for ranks in sharing:
        yield _Entry("param_groups", ranks, f"{len(groups)} of them", is_structure=True)
        for index, group in enumerate(groups):
            for name in (*options.NAMES, *checkpoint.ENTRIES):
                value = group[name] if isinstance(group[name], Tensor) else repr(group[name])
                yield _Entry(f"{name!r} of param_groups[{index}]", ranks, value)


def _description(p: Tensor, state: Mapping[str, Tensor]) -> str:
    where = f" in placements {p.placements}" if isinstance(p, DTensor) else ""
    keys = ", ".join(f"{key!r} ({value.dtype})" for key, value in sorted(state.items()))
    frozen = "" if p.requires_grad else "frozen, "
    return f"{frozen}{p.dtype} of shape {tuple(p.shape)}{where}, {f'state {keys}' if keys else 'no state'}"


def _holders(p: Tensor, replicas: dist.ProcessGroup | None, others: dist.ProcessGroup | None) -> set[Ranks]:
    """The ranks that hold something of a parameter: those of its mesh, and of its replicas.

    Args:
        replicas: The group of those that hold copies of what has no mesh across it, if it was said.
        others: The group of those that hold other parameters, if there are any.
    """
    if isinstance(p, DTensor):
        mesh = _ranks(p.device_mesh.mesh)
        across = replicas is None or len({*mesh} & {*_ranks(replicas)}) > 1
        return {mesh} if across else {mesh, _ranks(replicas)}
    if replicas is not None or others is None:
        return {_ranks(replicas)}
    if others.size() < dist.get_world_size():
        raise ValueError(
            "not all ranks are of the optimiser's process_group, and which of them hold copies of its plain "
            "tensors is not known: pass their group as replicas, here or to the optimiser."
        )
    return {(dist.get_rank(),)}


def _copies(tensor: Tensor, holders: Ranks) -> Ranks:
    """Of the ranks that hold a tensor, those that hold the same piece as this one."""
    if not isinstance(tensor, DTensor) or holders != _ranks(tensor.device_mesh.mesh):
        return holders
    along: list[int | slice] = list(tensor.device_mesh.get_coordinate() or ())
    for axis, placement in enumerate(tensor.placements):
        if cut_dim(placement, tensor.ndim) is None:
            along[axis] = slice(None)
    return _ranks(tensor.device_mesh.mesh[tuple(along)])


def _ranks(of: Tensor | dist.ProcessGroup | None) -> Ranks:
    """Those of a mesh, or of a process group; None: of the default one."""
    return tuple(
        sorted(of.flatten().tolist() if isinstance(of, Tensor) else dist.get_process_group_ranks(of))
    )


def _hashes(entries: Sequence[_Entry]) -> Tensor:
    """The hashes of all entries, int64, where the first tensor of them is; nothing waits for them."""
    tensors = {number: e.value for number, e in enumerate(entries) if isinstance(e.value, Tensor)}
    home = next((tensor.device for tensor in tensors.values()), "cpu")
    texts = ["" if isinstance(entry.value, Tensor) else entry.value for entry in entries]
    hashes = torch.tensor([_hash(text) for text in texts], dtype=torch.int64, device="cpu").to(
        home, non_blocking=True
    )
    for number, tensor in tensors.items():
        hashes[number] = _hash_of_bits(tensor)
    return hashes


def _sums(entries: Sequence[_Entry], hashes: Tensor) -> Tensor:
    """What is zero over all ranks where they agree; shape (bins,), int64."""
    rank = dist.get_rank()
    columns = (
        [len(entry.ranks) - 1 if rank == entry.ranks[0] else -1 for entry in entries],
        [entry.factor for entry in entries],
        [entry.bin for entry in entries],
    )
    shares, factors, bins = (
        torch.tensor(column, dtype=torch.int64, device="cpu").to(hashes.device) for column in columns
    )
    return hashes.new_zeros(_BINS).index_add_(0, bins, hashes * factors * shares)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _hash_of_bits(tensor: Tensor) -> Tensor:
    """A hash of the bits of all elements in their order; 0-dim, int64."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    start = 1
    for chunk in _chunks(tensor):
        end = start + chunk.numel()
        words = torch.arange(start, end, device=tensor.device).mul_(_GOLDEN)
        words += chunk.view(_INTEGERS[chunk.element_size()])
        for shift, factor in _ROUNDS:
            # A logical shift; torch's own carries the sign in.
            words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
        total += words.sum()
        start = end
    return total


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements in their order, few at a time, in one dimension, whatever its strides."""
    if tensor.numel() <= _CHUNK:
        yield tensor.reshape(-1)
        return
    outermost = next(dim for dim, size in enumerate(tensor.shape) if size > 1)
    for half in tensor.tensor_split(2, outermost):
        yield from _chunks(half)


def _differences(everyone: Sequence[Sequence[tuple[str, Ranks, str]]]) -> list[str]:
    """A line for each entry that differs, of what each rank has found: labels, ranks and values."""
    values: dict[tuple[str, Ranks], dict[int, str]] = defaultdict(dict)
    for rank, found in enumerate(everyone):
        for label, ranks, value in found:
            values[label, ranks][rank] = value
    lines = []
    for (label, ranks), its in values.items():
        holders: dict[str, list[str]] = defaultdict(list)
        for rank in ranks:
            holders[its.get(rank, "nothing")].append(str(rank))
        if len(holders) > 1:  # the minority first
            told = sorted(holders.items(), key=lambda one: len(one[1]))
            lines.append(f"{label}: " + _some([f"rank {_some(ranks, ', ')}: {v}" for v, ranks in told], "; "))
    return lines


def _some(texts: Sequence[str], separator: str) -> str:
    return separator.join([*texts[:_TOLD], *["…"] * (len(texts) > _TOLD)])
