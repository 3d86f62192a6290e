"""Complete sums over whole tensors and orthogonalise whole matrices: the protocol, and :class:`OneProcess`.

:class:`prodigyplus_dist.exchange.MeshExchange` is that of a process that holds pieces of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prodigyplus.formulas import muon
from prodigyplus.terms.layout import Layout
from prodigyplus.terms.requests import Answers, Asked, Matrices, Method, local_answers
from prodigyplus.torch_private import foreach_copy_

# How many bytes of directions may be alive at once, by default.
BUCKET_BYTES = 64 << 20


class Exchange(Protocol):
    """Completes sums over shards, and orthogonalises matrices; :class:`OneProcess` is the simplest."""

    # How many bytes of directions may be alive at once, while their sums are completed.
    bucket_bytes: int

    def complete(self, asked: Sequence[Asked]) -> Callable[[], list[Answers]]:
        """Begin to complete sums.

        Returns:
            A function that waits for the sums over whole tensors, and returns them in the order of ``asked``,
            under the same names.
        """
        ...

    def complete_and_compare(self, asked: Sequence[Asked], step_sizes: Callable[[], Tensor]) -> list[Answers]:
        """Complete the sums of a step's first round, and compare what every rank should have alike.

        Args:
            asked: As for :meth:`complete`: sums of the gradients' squares.
            step_sizes: Returns this rank's step sizes; float32, (groups,).

        Returns:
            The sums, as :meth:`complete`'s function does. What the comparison finds is :meth:`differ`'s.
        """
        ...

    def differing(self) -> dict[str, Tensor]:
        """Whether other ranks had other numbers when they were last compared; empty if there are no others.

        Returns:
            ``step_sizes``: for each group, whether its step size differs; bool, (groups,). If whole gradients
            were compared, ``gradients``: whether the gradients differ of tensors that each rank holds whole;
            bool, 0-dim.
        """
        ...

    def orthogonalize(
        self, asked: Sequence[tuple[Layout, Matrices]]
    ) -> Iterable[tuple[Sequence[int], Sequence[Tensor]]]:
        """Begin to orthogonalise whole matrices.

        Returns:
            An iterable over waves, as they are done: indices into ``asked``, and the local pieces of their
            results. Every index comes once.
        """
        ...

    def sum_over_stages(self, values: Tensor) -> Tensor:
        """Sum a few numbers over the ranks that hold other parameters of the same optimiser."""
        ...


class OneProcess:
    """The exchange of a single process, which holds whole tensors: every sum is already complete."""

    bucket_bytes = BUCKET_BYTES

    def complete(self, asked: Sequence[Asked]) -> Callable[[], list[Answers]]:
        answers = local_answers(asked)
        return lambda: answers

    def complete_and_compare(self, asked: Sequence[Asked], step_sizes: Callable[[], Tensor]) -> list[Answers]:
        return self.complete(asked)()

    def differing(self) -> dict[str, Tensor]:
        return {}

    def orthogonalize(
        self, asked: Sequence[tuple[Layout, Matrices]]
    ) -> Iterable[tuple[Sequence[int], Sequence[Tensor]]]:
        wholes = [(layout.shape, matrices) for layout, matrices in asked]
        return in_one_process(wholes, self.bucket_bytes)

    def sum_over_stages(self, values: Tensor) -> Tensor:
        return values


def in_one_process(
    asked: Sequence[tuple[tuple[int, ...], Matrices]], limit: int
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Orthogonalise whole tensors.

    Args:
        asked: Pairs of a tensor's shape and its request.
        limit: How many bytes of results may be alive at once; a single tensor may have more.

    Yields:
        Indices into ``asked``, and their results in the shapes of their tensors.
    """
    for wave in split_by_bytes([muon.bytes_of(shape, matrices) for shape, matrices in asked], limit):
        results, batches = _gathered([asked[number][1] for number in wave])
        muon.orthogonalize_(batches, limit)
        yield wave, results


def _gathered(asked: Sequence[Matrices]) -> tuple[list[Tensor], list[tuple[Tensor, Method]]]:
    """Copies of whole tensors, as views of batches; and these batches, for ``muon.orthogonalize_``."""
    alike: dict[tuple[tuple[int, int], Method, torch.device], list[int]] = {}
    counts = []
    for index, (local, batched, method, _) in enumerate(asked):
        count, rows, columns = muon.sizes(local.shape, batched=batched)
        counts.append(count)
        alike.setdefault(((rows, columns), method, local.device), []).append(index)
    results: dict[int, Tensor] = {}
    batches = []
    for (shape, method, device), indices in alike.items():
        lengths = [counts[index] for index in indices]
        batch = torch.empty(sum(lengths), *shape, dtype=method.dtype, device=device)
        locals_ = [asked[index].local for index in indices]
        copies = [
            part.view(local.shape) for part, local in zip(torch.split(batch, lengths), locals_, strict=True)
        ]
        foreach_copy_(copies, locals_)
        results.update(zip(indices, copies, strict=True))
        batches.append((batch, method))
    return [results[index] for index in range(len(asked))], batches


def split_by_bytes(sizes: Sequence[tuple[int, int]], limit: int) -> Iterator[list[int]]:
    """Split items into those that are worked on at once: consecutive indices into ``sizes``.

    Args:
        sizes: For each item, its bytes, and the bytes of its largest matrix.
        limit: The most bytes at once, or those of the largest matrix among them if these are more. A single
            item may exceed it.
    """
    wave: list[int] = []
    total, room = 0, limit
    for number, (size, matrix) in enumerate(sizes):
        room = max(room, matrix)
        if wave and total + size > room:
            yield wave
            wave, total, room = [], 0, max(limit, matrix)
        wave.append(number)
        total += size
    if wave:
        yield wave
