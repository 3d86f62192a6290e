"""Ranks without processes: a thread each, whose all-reduce adds up in the order of the ranks."""

import functools
import itertools
import math
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from prodigyplus.layout import Layout
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

# A rank that waits longer waits for ever.
TIMEOUT_S = 20


@dataclass(frozen=True)
class Placement:
    """How a mesh of ranks holds a tensor: of each of its axes the dimension that it cuts, and how.

    None for an axis of copies. The ways to cut are those of :func:`owners`.
    """

    mesh: tuple[int, ...]
    cuts: tuple[tuple[int, str] | None, ...]


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
    """The indices of a piece of a global tensor of this shape; uncut in the dimensions ``whole``."""
    ndim = len(shape)
    return tuple(
        torch.tensor(range(size) if dim in whole else layout.indices[dim], dtype=torch.int64).view(
            -1, *(1,) * (ndim - dim - 1)
        )
        for dim, size in enumerate(shape)
    )


class Ring:
    """The ranks along one axis of a mesh."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=TIMEOUT_S)
        self._board: list[Tensor] = [torch.empty(0)] * count

    def add_up(self, place: int, tensor: Tensor) -> None:
        self._board[place] = tensor.clone()
        self.barrier.wait()
        assert len({(value.shape, value.dtype) for value in self._board}) == 1, (
            "ranks that ask for other sums"
        )
        tensor.copy_(functools.reduce(torch.add, self._board))
        self.barrier.wait()


class Seat(NamedTuple):
    """A rank's place in a ring: what stands for a process group."""

    ring: Ring
    place: int


class Ranks:
    """Simulated ranks, as a context: within it ``torch.distributed.all_reduce`` is theirs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._rings: dict[tuple[int, ...], Ring] = {}
        self._threads = ThreadPoolExecutor(count)
        self._all_reduce = mock.patch(
            "torch.distributed.all_reduce", lambda tensor, group: group.ring.add_up(group.place, tensor)
        )

    def __enter__(self) -> "Ranks":
        self._all_reduce.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        self._all_reduce.stop()

    def each(self, work: Callable[[int], object]) -> list:
        """What ``work`` gives for each rank; where it fails on one, the others do not wait for it."""

        def guarded(rank: int) -> object:
            try:
                return work(rank)
            except BaseException:
                for ring in self._rings.values():
                    ring.barrier.abort()
                raise

        futures = [self._threads.submit(guarded, rank) for rank in range(self.count)]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        for failure in sorted(
            failures, key=lambda failure: isinstance(failure, threading.BrokenBarrierError)
        ):
            raise failure
        return [future.result() for future in futures]

    def layouts(self, shape: tuple[int, ...], placement: Placement) -> list[Layout]:
        """Of a tensor, what each rank holds of it."""
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
                indices[dim] = _range_if_one(
                    [index for index, owner in zip(along, owned, strict=True) if owner == coordinate[axis]]
                )
                cuts.append((seat, dim))
            found.append((tuple(indices), tuple(cuts), tuple(copies)))
        most = max(math.prod(map(len, indices)) for indices, _, _ in found)
        return [Layout(shape, *rest, most) for rest in found]

    def _seat(self, coordinates: list[tuple[int, ...]], coordinate: tuple[int, ...], axis: int) -> Seat:
        ranks = tuple(
            rank
            for rank, other in enumerate(coordinates)
            if other[:axis] + other[axis + 1 :] == coordinate[:axis] + coordinate[axis + 1 :]
        )
        return Seat(self._rings.setdefault(ranks, Ring(len(ranks))), coordinate[axis])


def _range_if_one(indices: list[int]) -> Sequence[int]:
    if not indices:
        return range(0)
    run = range(indices[0], indices[-1] + 1)
    return run if len(run) == len(indices) else tuple(indices)


class OneRank(ShardedProdigyPlusScheduleFree):
    """The optimiser of one rank, whose parameters are plain tensors, each a piece of another."""

    def __init__(self, groups: list[dict], layouts: dict[Tensor, Layout], bucket_bytes: int) -> None:
        self._given_layouts = layouts
        super().__init__(groups, bucket_bytes=bucket_bytes)

    def _layout(self, p: Tensor) -> Layout:
        return self._given_layouts[p]
