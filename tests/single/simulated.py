"""Ranks without processes: each is a thread, and all-reduce adds up in the order of the ranks.

A value is copied when it is sent. The receiver has it only once it has waited for it.
"""

import contextlib
import functools
import itertools
import math
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from prodigyplus.terms.layout import Layout
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from prodigyplus_dist.layout import MeshLayout, range_if_consecutive
from prodigyplus_dist.placement import MeshTensors

# A rank that has waited this long would wait for ever.
TIMEOUT_S = 20


@dataclass(frozen=True)
class Placement:
    """How a mesh holds a tensor: for each mesh axis, the dimension that it cuts, and in which way.

    None stands for an axis of copies. The ways to cut are those of :func:`owners`.
    """

    mesh: tuple[int, ...]
    cuts: tuple[tuple[int, str] | None, ...]
    backwards: bool = False  # whether the pieces are numbered against the order of the ranks


def owners(size: int, count: int, way: str) -> list[int]:
    """Which of ``count`` pieces each index along a dimension of this size belongs to."""
    drawn = random.Random(f"{size} {count}").choices(range(count), k=size)
    return {
        "even": [index // max(1, -(-size // count)) for index in range(size)],
        "uneven": sorted(drawn),
        "last": [count - 1] * size,
        "strided": [index % count for index in range(size)],
        "scattered": drawn,
    }[way]


def indices_of(layout: Layout, shape: Sequence[int], whole: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """The global indices that a piece of a tensor holds; all indices along the dimensions ``whole``."""
    ndim = len(shape)
    return tuple(
        torch.tensor(range(size) if dim in whole else layout.indices[dim], dtype=torch.int64).view(
            -1, *(1,) * (ndim - dim - 1)
        )
        for dim, size in enumerate(shape)
    )


class Ring:
    """Some ranks, and the values under way between them."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self._sent: dict[Hashable, Tensor | tuple[Tensor, ...]] = {}
        self._changed = threading.Condition()
        self._counts: dict[Hashable, int] = defaultdict(int)
        self._broken = False

    def send(self, channel: tuple[Hashable, ...], value: Tensor | tuple[Tensor, ...]) -> None:
        """Send a copy; the values sent through one channel keep their order."""
        value = value.clone() if isinstance(value, Tensor) else tuple(one.clone() for one in value)
        with self._changed:
            self._sent[channel, self._next("sent", channel)] = value
            self._changed.notify_all()

    def receive(self, channel: tuple[Hashable, ...]) -> Callable[[], Tensor | tuple[Tensor, ...]]:
        """A function that waits for the channel's next value, and returns it."""
        with self._changed:
            key = channel, self._next("received", channel)

        def wait() -> Tensor | tuple[Tensor, ...]:
            with self._changed:
                if not self._changed.wait_for(lambda: self._broken or key in self._sent, TIMEOUT_S):
                    raise TimeoutError(f"{key} of ranks {self.ranks} never came")
                if self._broken:
                    raise threading.BrokenBarrierError
                return self._sent.pop(key)

        return wait

    def abort(self) -> None:
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def left(self) -> list[Hashable]:
        """What was sent and never received."""
        return list(self._sent)

    def _next(self, what: str, channel: tuple[Hashable, ...]) -> int:
        self._counts[what, channel] += 1
        return self._counts[what, channel]


class Seat(NamedTuple):
    """A rank's place in a ring; it takes the part of a process group."""

    ring: Ring
    place: int

    def exchange(self, name: str, value: Tensor | tuple[Tensor, ...]) -> Callable[[], list]:
        """Send a value to all; the function returned receives theirs, in the order of the places."""
        places = range(len(self.ring.ranks))
        for peer in places:
            self.ring.send((name, self.place, peer), value)
        waits = [self.ring.receive((name, peer, self.place)) for peer in places]
        return lambda: [wait() for wait in waits]


class Work(NamedTuple):
    """Takes the part of :class:`torch.distributed.Work`."""

    wait: Callable[[], object]


class P2POp(NamedTuple):
    op: Callable
    tensor: Tensor
    group: Seat
    group_peer: int


def all_reduce(tensor: Tensor, group: Seat, *, async_op: bool) -> Work:
    assert async_op
    theirs = group.exchange("all-reduce", tensor)

    def finish() -> None:
        values = theirs()
        assert len({(value.shape, value.dtype) for value in values}) == 1, "ranks ask for different sums"
        tensor.copy_(functools.reduce(torch.add, values))

    return Work(finish)


def all_to_all_single(
    output: Tensor, given: Tensor, output_sizes: list[int], sizes: list[int], group: Seat, *, async_op: bool
) -> Work:
    assert async_op
    assert output.ndim == given.ndim == 1
    theirs = group.exchange("all-to-all", torch.split(given, sizes))

    def wait() -> None:
        for own, parts in zip(torch.split(output, output_sizes), theirs(), strict=True):
            assert (own.shape, own.dtype) == (parts[group.place].shape, given.dtype), "sizes differ"
            own.copy_(parts[group.place])

    return Work(wait)


def broadcast(tensor: Tensor, source: int, group: Seat, *, async_op: bool) -> Work:
    assert async_op
    mine = group.ring.ranks[group.place] == source
    theirs = group.exchange("broadcast", tensor if mine else tensor.new_empty(tensor.shape))

    def wait() -> None:
        values = theirs()
        assert len({(value.shape, value.dtype) for value in values}) == 1, "sizes differ"
        tensor.copy_(values[group.ring.ranks.index(source)])

    return Work(wait)


def batch_isend_irecv(operations: Sequence[P2POp]) -> list[Work]:
    assert operations
    assert all(one.tensor.numel() for one in operations), "an empty message"
    assert all(one.group_peer != one.group.place for one in operations), "a message to itself"

    def begin(one: P2POp) -> Work:
        ring, place = one.group
        if one.op is dist.isend:
            ring.send(("to one", place, one.group_peer), one.tensor)
            return Work(lambda: None)
        assert one.op is dist.irecv
        arrived = ring.receive(("to one", one.group_peer, place))

        def wait() -> None:
            value = arrived()
            assert (value.shape, value.dtype) == (one.tensor.shape, one.tensor.dtype), "sizes differ"
            one.tensor.copy_(value)

        return Work(wait)

    return [begin(one) for one in operations]


class Ranks:
    """Simulated ranks, as a context in which ``torch.distributed``'s collectives run between them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._rings: dict[tuple[str, tuple[int, ...]], Ring] = {}
        self._lock = threading.Lock()
        self._here = threading.local()
        self._threads = ThreadPoolExecutor(count)
        ours = {
            "all_reduce": all_reduce,
            "all_to_all_single": all_to_all_single,
            "broadcast": broadcast,
            "batch_isend_irecv": batch_isend_irecv,
            "P2POp": P2POp,
        }
        self._patched = contextlib.ExitStack()
        self._patches = (
            mock.patch.multiple("torch.distributed", **ours),
            mock.patch("prodigyplus_dist.transport.group_across", self._group_across),
        )

    def __enter__(self) -> "Ranks":
        for patch in self._patches:
            self._patched.enter_context(patch)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        self._patched.close()

    @property
    def groups(self) -> set[tuple[int, ...]]:
        """The process groups that have been asked for."""
        return {ranks for kind, ranks in self._rings if kind == "own"}

    @property
    def here(self) -> int:
        """The rank of the calling thread."""
        return self._here.rank

    def group(self, ranks: Sequence[int]) -> Seat:
        """The process group of these ranks, which are in ascending order."""
        return Seat(self._ring("own", tuple(ranks)), ranks.index(self.here))

    def each(self, work: Callable[[int], object]) -> list:
        """The results of ``work`` on each rank. If one rank fails, the others stop waiting for it."""

        def guarded(rank: int) -> object:
            self._here.rank = rank
            try:
                return work(rank)
            except BaseException:
                with self._lock:
                    for ring in self._rings.values():
                        ring.abort()
                raise

        futures = [self._threads.submit(guarded, rank) for rank in range(self.count)]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        for failure in sorted(
            failures, key=lambda failure: isinstance(failure, threading.BrokenBarrierError)
        ):
            raise failure
        assert not [left for ring in self._rings.values() for left in ring.left()]
        return [future.result() for future in futures]

    def layouts(self, shape: tuple[int, ...], placement: Placement) -> list[MeshLayout]:
        """The layout of a tensor on each rank."""
        coordinates = list(itertools.product(*map(range, placement.mesh)))
        assert len(coordinates) == self.count
        found = []
        for coordinate in coordinates:
            indices: list[Sequence[int]] = [range(size) for size in shape]
            cuts, copies = [], []
            for axis, (size, cut) in enumerate(zip(placement.mesh, placement.cuts, strict=True)):
                if size == 1:
                    continue
                seat = self._seat(coordinates, coordinate, axis)
                if cut is None:
                    copies.append(seat)
                    continue
                dim, way = cut
                along = indices[dim]
                owned = owners(len(along), size, way)
                indices[dim] = range_if_consecutive(
                    [index for index, owner in zip(along, owned, strict=True) if owner == coordinate[axis]]
                )
                cuts.append((seat, dim))
            found.append((tuple(indices), tuple(cuts), tuple(copies)))
        most = max(math.prod(map(len, indices)) for indices, _, _ in found)

        def along(coordinate: tuple[int, ...], *, copying: bool) -> tuple[int, ...]:
            return tuple(
                at for at, cut in zip(coordinate, placement.cuts, strict=True) if (cut is None) == copying
            )

        # One row for each copy, one column for each piece.
        places = [(along(its, copying=True), along(its, copying=False)) for its in coordinates]
        rows = sorted({row for row, _ in places})
        columns = sorted({column for _, column in places}, reverse=placement.backwards)
        grid = tuple(tuple(places.index((row, column)) for column in columns) for row in rows)
        pieces = [found[rank][0] for rank in grid[0]]
        return [
            MeshLayout(shape, *its, most, grid, (rows.index(row), columns.index(column)), lambda: pieces)
            for its, (row, column) in zip(found, places, strict=True)
        ]

    def _seat(self, coordinates: list[tuple[int, ...]], coordinate: tuple[int, ...], axis: int) -> Seat:
        ranks = tuple(
            rank
            for rank, other in enumerate(coordinates)
            if other[:axis] + other[axis + 1 :] == coordinate[:axis] + coordinate[axis + 1 :]
        )
        return Seat(self._ring("mesh", ranks), coordinate[axis])

    def _group_across(
        self, axes: Sequence[Seat], ranks: Sequence[int], device: torch.device, *, callers: int
    ) -> Seat | None:
        assert list(ranks) == sorted(ranks)
        assert set(ranks) >= {rank for axis in axes for rank in axis.ring.ranks}
        return self.group(ranks) if len(ranks) > 1 else None

    def _ring(self, kind: str, ranks: tuple[int, ...]) -> Ring:
        with self._lock:
            return self._rings.setdefault((kind, ranks), Ring(ranks))


class Pieces(MeshTensors):
    """The placement of plain tensors, each of which is a piece of a larger one."""

    def __init__(self, layouts: dict[Tensor, MeshLayout]) -> None:
        super().__init__(None)
        self._given = layouts

    def layout(self, p: Tensor) -> MeshLayout:
        return self._given[p]


class OneRank(ShardedProdigyPlusScheduleFree):
    """The sharded optimiser on one rank, with pieces of tensors as its parameters."""

    def __init__(self, groups: list[dict], layouts: dict[Tensor, MeshLayout], **options: object) -> None:
        super().__init__(groups, **options)
        self._placement = Pieces(layouts)
