"""Orthogonalise whole matrices on a mesh, each once: its pieces go to one rank, the result's come back.

A matrix is orthogonalised by its owner, one of the ranks that hold a piece of it. Within a copy of the
tensors that takes two all-to-alls of uneven sizes. Where there are several copies, each owns a part of the
matrices and shares the results with the others.

===========  ====================================================================
``send``     pieces to the owners, among the ranks of a copy
``compute``  Newton–Schulz at the owners; then begins to send back
``receive``  pieces of the results; then, a bucket at a time, those of other copies
===========  ====================================================================

Matrices go in waves: the pieces of one travel while the one before is computed, and its results while the
next is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from prodigyplus.formulas import muon
from prodigyplus.terms.requests import Matrices, Method
from prodigyplus_dist import transport
from prodigyplus_dist.layout import MeshLayout
from prodigyplus_dist.ownership import Block, MatrixSharding, assign_owners

Asked = tuple[MeshLayout, Matrices]


class Orthogonalizer:
    """Orthogonalises matrices whose pieces are on several ranks.

    Args:
        bucket_bytes: How many bytes of matrices a rank sends, and computes on, at once; or one matrix.
        all_to_all: Send with all-to-alls. False: point to point.
    """

    def __init__(self, bucket_bytes: int, *, all_to_all: bool) -> None:
        self.bucket_bytes = bucket_bytes
        self.all_to_all = all_to_all
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        self._shardings: dict[tuple[int, bool], MatrixSharding] = {}
        self._plans: dict[tuple[tuple[MatrixSharding, ...], int], list[Block]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_groups": {}, "_shardings": {}, "_plans": {}}  # which are made anew

    def orthogonalize(self, asked: Sequence[Asked]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """See :class:`prodigyplus.engine.driver.Exchange`."""
        sizes = []
        for layout, matrices in asked:
            self._join(layout, matrices.local.device)
            _, matrix = muon.bytes_of(layout.shape, matrices)
            # Each copy owns its share.
            sizes.append(
                (layout.max_local_numel * matrices.method.dtype.itemsize // len(layout.ranks), matrix)
            )
        waves = [
            MatrixBatch(self, numbers, [asked[number] for number in numbers])
            for numbers in muon.waves(sizes, self.bucket_bytes)
        ]
        waves[0].send()
        return self._finish(waves)

    def _finish(self, waves: Sequence[MatrixBatch]) -> Iterator[tuple[list[int], list[Tensor]]]:
        for number, wave in enumerate(waves):
            if number + 1 < len(waves):
                waves[number + 1].send()
            wave.compute()
            if number:
                yield from waves[number - 1].receive()
        yield from waves[-1].receive()

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """The process group of these ranks; None of one rank."""
        return self._groups[tuple(sorted(ranks))]

    def _join(self, layout: MeshLayout, device: torch.device) -> None:
        """Find the process groups of the ranks that hold a copy of a tensor, and of those that hold a piece.

        All ranks ask for theirs in the order of the parameters, which is the same for all.
        """
        cutting = [cast("dist.ProcessGroup", axis) for axis, _ in layout.shard_axes]
        copying = [cast("dist.ProcessGroup", axis) for axis in layout.replica_axes]
        callers = sum(map(len, layout.ranks))
        for ranks, axes in ((layout.row, cutting), (layout.column, copying)):
            key = tuple(sorted(ranks))
            if key not in self._groups:
                self._groups[key] = transport.group_across(axes, key, device, callers=callers)

    def plan(self, asked: Sequence[Asked]) -> tuple[tuple[MatrixSharding, ...], list[Block]]:
        """Where the pieces of the tensors are, and who owns their matrices."""
        shardings = tuple(self._sharding(layout, matrices.batched) for layout, matrices in asked)
        key = shardings, asked[0][1].parameter
        if key not in self._plans:
            self._plans[key] = assign_owners(*key)
        return shardings, self._plans[key]

    def _sharding(self, layout: MeshLayout, batched: bool) -> MatrixSharding:
        key = id(layout), batched  # of a layout that the sharding keeps alive
        if key not in self._shardings:
            self._shardings[key] = MatrixSharding(layout, batched=batched)
        return self._shardings[key]


class ShardGroup:
    """The ranks that hold a copy of some tensors between them, and what they exchange, in one dtype.

    Args:
        layout: Of one of the tensors.
        group: The ranks.
        like: A tensor of the dtype, and on the device.
        all_to_all: See :class:`Orthogonalizer`.
    """

    def __init__(
        self, layout: MeshLayout, group: dist.ProcessGroup | None, like: Tensor, *, all_to_all: bool
    ) -> None:
        self._column = layout.coordinate[1]
        # In the order of the group, which is that of the ranks.
        self._columns = sorted(range(len(layout.row)), key=layout.row.__getitem__)
        self._group = group
        self._all_to_all = all_to_all
        self._like = like
        self._travels = False
        self._owned_by: dict[int, list[tuple[Block, MatrixSharding, Matrices]]] = defaultdict(list)
        self._wait: Callable[[], list[list[Tensor]]]

    def add(self, block: Block, sharding: MatrixSharding, matrices: Matrices) -> None:
        """Take in matrices that one of the ranks owns."""
        self._owned_by[block.column].append((block, sharding, matrices))
        self._travels |= block.travels

    def _of(self, column: int) -> Sequence[tuple[Block, MatrixSharding, Matrices]]:
        return self._owned_by.get(column, ())

    def send(self) -> None:
        """Begin to send pieces to owners."""
        self._swap(
            [
                [its.within(block, matrices.local) for block, its, matrices in self._of(c)]
                for c in self._columns
            ],
            [[its.piece_shape(block, c) for block, its, _ in self._of(self._column)] for c in self._columns],
        )

    def arrived(self) -> list[tuple[Tensor, Method]]:
        """The matrices that this rank owns, whole; shape (count, rows, columns)."""
        pieces = self._came()
        wholes = []
        for (block, its, matrices), of_block in zip(
            self._of(self._column), zip(*pieces, strict=True), strict=True
        ):
            whole = self._like.new_empty(block.size, its.rows, its.columns)
            its.put(whole, zip(self._columns, of_block, strict=True))
            wholes.append((whole, matrices.method))
        return wholes

    def send_back(self, results: Sequence[Tensor]) -> None:
        """Begin to send pieces of what became of these matrices to those who hold them."""
        owned = list(zip(self._of(self._column), results, strict=True))
        self._swap(
            [[its.taken(block, result, c) for (block, its, _), result in owned] for c in self._columns],
            [[its.piece_shape(block, self._column) for block, its, _ in self._of(c)] for c in self._columns],
        )

    def receive_results(self) -> dict[Block, Tensor]:
        """The pieces of the results that are of this rank."""
        pieces = self._came()
        return {
            block: piece
            for column, of_column in zip(self._columns, pieces, strict=True)
            for (block, *_), piece in zip(self._of(column), of_column, strict=True)
        }

    def _came(self) -> list[list[Tensor]]:
        pieces = self._wait()
        del self._wait  # and what it keeps alive
        return pieces

    def _swap(self, outgoing: list[list[Tensor]], incoming: list[list[tuple[int, int, int]]]) -> None:
        self._wait = transport.swap(
            outgoing,
            incoming,
            self._group if self._travels else None,
            self._columns.index(self._column),
            like=self._like,
            all_to_all=self._all_to_all,
        )


class MatrixBatch:
    """Tensors whose matrices are orthogonalised at once.

    Args:
        by: What orthogonalises them.
        numbers: Those of the requests.
        asked: The requests.
    """

    def __init__(self, by: Orthogonalizer, numbers: Sequence[int], asked: Sequence[Asked]) -> None:
        self._by = by
        self._numbers = numbers
        self._asked = asked

    def send(self) -> None:
        """Begin to send the pieces of matrices to their owners."""
        self._shardings, self._blocks = self._by.plan(self._asked)
        # In the order of the requests, which is that of all ranks, whoever owns what of them.
        groups: dict[tuple[tuple[int, ...], torch.dtype], ShardGroup] = {}
        for layout, matrices in self._asked:
            key = layout.row, matrices.method.dtype
            if key not in groups:
                like = matrices.local.new_empty(0, dtype=matrices.method.dtype)
                groups[key] = ShardGroup(
                    layout, self._by.group(layout.row), like, all_to_all=self._by.all_to_all
                )
        for block in self._blocks:
            layout, matrices = self._asked[block.request]
            if block.row == layout.coordinate[0]:
                group = groups[layout.row, matrices.method.dtype]
                group.add(block, self._shardings[block.request], matrices)
        self._shard_groups = list(groups.values())
        for group in self._shard_groups:
            group.send()

    def compute(self) -> None:
        """Orthogonalise the matrices that this rank owns; begin to send the pieces of the results back."""
        arrived = [group.arrived() for group in self._shard_groups]
        muon.orthogonalize_([one for of_group in arrived for one in of_group], self._by.bucket_bytes)
        for group, owned in zip(self._shard_groups, arrived, strict=True):
            group.send_back([matrices for matrices, _ in owned])

    def receive(self) -> Iterator[tuple[list[int], list[Tensor]]]:
        """The pieces of the results that are here, by the numbers of the requests."""
        received = [group.receive_results() for group in self._shard_groups]
        pieces = {block: piece for of_group in received for block, piece in of_group.items()}
        self._shard_groups.clear()
        by_request = defaultdict(list)
        for block in self._blocks:
            by_request[block.request].append(block)
        sizes = [
            (layout.max_local_numel * matrices.method.dtype.itemsize, 0) for layout, matrices in self._asked
        ]
        for requests in muon.waves(sizes, self._by.bucket_bytes):
            self._share([block for request in requests for block in by_request[request]], pieces)
            results = []
            for request in requests:
                _, matrices = self._asked[request]
                its = [pieces.pop(block) for block in by_request[request]]
                here = [piece for piece in its if piece.numel()]
                result = (
                    here[0] if len(here) == 1 else matrices.local.new_empty(0, dtype=matrices.method.dtype)
                )
                results.append((torch.cat(here) if len(here) > 1 else result).view(matrices.local.shape))
            yield [self._numbers[request] for request in requests], results

    def _share(self, blocks: Sequence[Block], pieces: dict[Block, Tensor]) -> None:
        """Give the pieces that this rank has to who holds the same in other copies, and take theirs."""
        shared: dict[tuple[tuple[int, ...], int, torch.dtype], list[Block]] = {}
        for block in blocks:
            layout, matrices = self._asked[block.request]
            if len(layout.ranks) > 1:
                shared.setdefault((layout.column, block.row, matrices.method.dtype), []).append(block)
        under_way = []
        for (ranks, row, dtype), its in shared.items():
            group = self._by.group(ranks)
            assert group is not None
            wait = transport.share(
                [pieces[block] for block in its if block in pieces],
                [self._shardings[block.request].own_shape(block) for block in its],
                ranks[row],
                group,
                like=self._asked[its[0].request][1].local.new_empty(0, dtype=dtype),
            )
            under_way.append((its, wait))
        for its, wait in under_way:
            pieces.update(zip(its, wait(), strict=True))
