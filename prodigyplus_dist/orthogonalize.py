"""Orthogonalise whole matrices on a mesh, each once: gather its pieces on one rank, scatter the result.

A matrix is orthogonalised by its owner, one of the ranks that hold a piece of it. Within a copy of the
tensors that takes two all-to-alls of uneven sizes. Where there are several copies, each owns a part of the
matrices and broadcasts the results to the others.

===========  ====================================================================
``send``     begins to send pieces to the owners, among the ranks of a copy
``compute``  Newton–Schulz at the owners; then begins to send the results back
``receive``  pieces of the results; then, a bucket at a time, those of other copies
===========  ====================================================================

Matrices go in waves: the pieces of a wave travel while the wave before is computed, and its results while the
wave after is computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from prodigyplus.exchange import split_by_bytes
from prodigyplus.formulas import muon
from prodigyplus.terms.requests import Matrices, Method
from prodigyplus_dist import transport
from prodigyplus_dist.layout import MeshLayout
from prodigyplus_dist.ownership import Block, MatrixSharding, assign_owners

MatrixRequest = tuple[MeshLayout, Matrices]


class Orthogonalizer:
    """Orthogonalises matrices whose pieces are on several ranks.

    Args:
        bucket_bytes: How many bytes of matrices a rank sends, and computes on, at once; at least one matrix.
        all_to_all: Send with all-to-alls. False: point to point.
    """

    def __init__(self, bucket_bytes: int, *, all_to_all: bool) -> None:
        self.bucket_bytes = bucket_bytes
        self.all_to_all = all_to_all
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        self._shardings: dict[tuple[int, bool], MatrixSharding] = {}
        self._plans: dict[tuple[tuple[MatrixSharding, ...], int], list[Block]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_groups": {}, "_shardings": {}, "_plans": {}}  # caches, filled again

    def orthogonalize(self, requests: Sequence[MatrixRequest]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Begin to orthogonalise; see :class:`prodigyplus.exchange.Exchange`."""
        sizes = []
        for layout, matrices in requests:
            self._make_groups(layout, matrices.local.device)
            _, matrix_bytes = muon.bytes_of(layout.shape, matrices)
            # Each copy owns its share.
            sizes.append((_piece_bytes(layout, matrices) // len(layout.ranks), matrix_bytes))
        waves = [
            Wave(self, indices, [requests[index] for index in indices])
            for indices in split_by_bytes(sizes, self.bucket_bytes)
        ]
        waves[0].send()
        return self._finish(waves)

    def _finish(self, waves: Sequence[Wave]) -> Iterator[tuple[list[int], list[Tensor]]]:
        for index, wave in enumerate(waves):
            if index + 1 < len(waves):
                waves[index + 1].send()
            wave.compute()
            if index:
                yield from waves[index - 1].receive()
        yield from waves[-1].receive()

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """The process group of these ranks; None for a single rank."""
        return self._groups[tuple(sorted(ranks))]

    def _make_groups(self, layout: MeshLayout, device: torch.device) -> None:
        """Find or make the process groups of the ranks that share a copy, and of those that share a piece.

        All ranks call it for the parameters in the same order.
        """
        sharding_axes = [cast("dist.ProcessGroup", axis) for axis, _ in layout.shard_axes]
        replicating_axes = [cast("dist.ProcessGroup", axis) for axis in layout.replica_axes]
        callers = sum(map(len, layout.ranks))
        for ranks, axes in ((layout.copy_ranks, sharding_axes), (layout.piece_ranks, replicating_axes)):
            key = tuple(sorted(ranks))
            if key not in self._groups:
                self._groups[key] = transport.group_across(axes, key, device, callers=callers)

    def plan(self, requests: Sequence[MatrixRequest]) -> tuple[tuple[MatrixSharding, ...], list[Block]]:
        """The shardings of the requested tensors, and the blocks in which their matrices are owned."""
        shardings = tuple(self._sharding(layout, matrices.batched) for layout, matrices in requests)
        key = shardings, requests[0][1].ordinal
        if key not in self._plans:
            self._plans[key] = assign_owners(*key)
        return shardings, self._plans[key]

    def _sharding(self, layout: MeshLayout, batched: bool) -> MatrixSharding:
        key = id(layout), batched  # the sharding keeps the layout alive, so that its id is not reused
        if key not in self._shardings:
            self._shardings[key] = MatrixSharding(layout, batched=batched)
        return self._shardings[key]


class ShardGroup:
    """The ranks that together hold one copy of some tensors, and the pieces they exchange, in one dtype.

    Args:
        layout: The layout of one of the tensors.
        group: The process group of the ranks; None for a single rank.
        like: A tensor of the dtype to send in, on the device to send from.
        all_to_all: See :class:`Orthogonalizer`.
    """

    def __init__(
        self, layout: MeshLayout, group: dist.ProcessGroup | None, like: Tensor, *, all_to_all: bool
    ) -> None:
        # Each rank is known by the number of its piece.
        self._own = layout.own[1]
        # In the order of the group, which is that of the ranks.
        self._order = sorted(range(len(layout.copy_ranks)), key=layout.copy_ranks.__getitem__)
        self._group = group
        self._all_to_all = all_to_all
        self._like = like
        self._travels = False
        # By their owner.
        self._blocks: dict[int, list[tuple[Block, MatrixSharding, Matrices]]] = defaultdict(list)
        self._wait: Callable[[], list[list[Tensor]]]

    def add(self, block: Block, sharding: MatrixSharding, matrices: Matrices) -> None:
        """Add matrices that one of the ranks owns."""
        self._blocks[block.piece].append((block, sharding, matrices))
        self._travels |= block.travels

    def send(self) -> None:
        """Begin to send pieces to owners."""
        self._swap(
            [
                [
                    sharding.local_piece(block, matrices.local)
                    for block, sharding, matrices in self._blocks[holder]
                ]
                for holder in self._order
            ],
            [
                [sharding.piece_shape(block, holder) for block, sharding, _ in self._blocks[self._own]]
                for holder in self._order
            ],
        )

    def receive(self) -> list[tuple[Tensor, Method]]:
        """The whole matrices that this rank owns, of shape (count, rows, columns), with their methods."""
        wholes = []
        for (block, sharding, matrices), pieces in zip(
            self._blocks[self._own], zip(*self._received(), strict=True), strict=True
        ):
            whole = self._like.new_empty(block.size, sharding.rows, sharding.columns)
            sharding.assemble_(whole, zip(self._order, pieces, strict=True))
            wholes.append((whole, matrices.method))
        return wholes

    def send_back(self, results: Sequence[Tensor]) -> None:
        """Begin to send pieces of the results, in the order of :meth:`receive`, to their holders."""
        owned = list(zip(self._blocks[self._own], results, strict=True))
        self._swap(
            [
                [sharding.piece_of(block, result, holder) for (block, sharding, _), result in owned]
                for holder in self._order
            ],
            [
                [sharding.local_shape(block) for block, sharding, _ in self._blocks[holder]]
                for holder in self._order
            ],
        )

    def receive_results(self) -> dict[Block, Tensor]:
        """The pieces of the results that this rank holds, by block."""
        return {
            block: piece
            for holder, pieces in zip(self._order, self._received(), strict=True)
            for (block, *_), piece in zip(self._blocks[holder], pieces, strict=True)
        }

    def _received(self) -> list[list[Tensor]]:
        pieces = self._wait()
        del self._wait  # and the buffers it keeps alive
        return pieces

    def _swap(self, outgoing: list[list[Tensor]], incoming: list[list[tuple[int, int, int]]]) -> None:
        self._wait = transport.swap(
            outgoing,
            incoming,
            self._group if self._travels else None,
            self._order.index(self._own),
            like=self._like,
            all_to_all=self._all_to_all,
        )


class Wave:
    """The tensors of one wave, whose matrices are orthogonalised at once.

    Args:
        orthogonalizer: Keeps the plans and the process groups.
        request_indices: The indices of the requests among those of all waves.
        requests: The requests.
    """

    def __init__(
        self,
        orthogonalizer: Orthogonalizer,
        request_indices: Sequence[int],
        requests: Sequence[MatrixRequest],
    ) -> None:
        self._orthogonalizer = orthogonalizer
        self._request_indices = request_indices
        self._requests = requests

    def send(self) -> None:
        """Begin to send the pieces of matrices to their owners."""
        orthogonalizer = self._orthogonalizer
        self._shardings, self._blocks = orthogonalizer.plan(self._requests)
        # In the order of the requests, which is the same on all ranks, whatever blocks they own.
        groups: dict[tuple[tuple[int, ...], torch.dtype], ShardGroup] = {}
        for layout, matrices in self._requests:
            key = layout.copy_ranks, matrices.method.dtype
            if key not in groups:
                group, like = orthogonalizer.group(layout.copy_ranks), _empty(matrices)
                groups[key] = ShardGroup(layout, group, like, all_to_all=orthogonalizer.all_to_all)
        for block in self._blocks:
            layout, matrices = self._requests[block.request]
            if block.copy == layout.own[0]:
                key = layout.copy_ranks, matrices.method.dtype
                groups[key].add(block, self._shardings[block.request], matrices)
        self._shard_groups = list(groups.values())
        for shard_group in self._shard_groups:
            shard_group.send()

    def compute(self) -> None:
        """Orthogonalise the matrices that this rank owns; begin to send the pieces of the results back."""
        owned = [group.receive() for group in self._shard_groups]
        muon.orthogonalize_(
            [batch for batches in owned for batch in batches], self._orthogonalizer.bucket_bytes
        )
        for group, batches in zip(self._shard_groups, owned, strict=True):
            group.send_back([matrices for matrices, _ in batches])

    def receive(self) -> Iterator[tuple[list[int], list[Tensor]]]:
        """The local pieces of the results, with the indices of their requests, a bucket at a time."""
        pieces: dict[Block, Tensor] = {}
        for group in self._shard_groups:
            pieces |= group.receive_results()
        self._shard_groups.clear()
        blocks = defaultdict(list)
        for block in self._blocks:
            blocks[block.request].append(block)
        sizes = [(_piece_bytes(layout, matrices), 0) for layout, matrices in self._requests]
        for bucket in split_by_bytes(sizes, self._orthogonalizer.bucket_bytes):
            self._broadcast_([block for index in bucket for block in blocks[index]], pieces)
            results = []
            for index in bucket:
                _, matrices = self._requests[index]
                parts = [pieces.pop(block) for block in blocks[index]]
                parts = [part for part in parts if part.numel()] or [_empty(matrices)]
                result = parts[0] if len(parts) == 1 else torch.cat(parts)
                results.append(result.view(matrices.local.shape))
            yield [self._request_indices[index] for index in bucket], results

    def _broadcast_(self, blocks: Sequence[Block], pieces: dict[Block, Tensor]) -> None:
        """Broadcast this rank's pieces to the ranks with the same piece in other copies; add theirs."""
        shared: dict[tuple[tuple[int, ...], int, torch.dtype], list[Block]] = {}
        for block in blocks:
            layout, matrices = self._requests[block.request]
            if len(layout.ranks) > 1:
                shared.setdefault((layout.piece_ranks, block.copy, matrices.method.dtype), []).append(block)
        under_way = []
        for (ranks, owner, _), together in shared.items():
            group = self._orthogonalizer.group(ranks)
            assert group is not None
            wait = transport.broadcast(
                [pieces[block] for block in together if block in pieces],
                [self._shardings[block.request].local_shape(block) for block in together],
                ranks[owner],
                group,
                like=_empty(self._requests[together[0].request][1]),
            )
            under_way.append((together, wait))
        for together, wait in under_way:
            pieces.update(zip(together, wait(), strict=True))


def _piece_bytes(layout: MeshLayout, matrices: Matrices) -> int:
    """The bytes of a tensor's largest piece when it is sent."""
    return layout.max_local_numel * matrices.method.dtype.itemsize


def _empty(matrices: Matrices) -> Tensor:
    """An empty tensor on the device of the matrices, of the dtype that they are sent in."""
    return matrices.local.new_empty(0, dtype=matrices.method.dtype)
