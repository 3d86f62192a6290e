"""What completes sums over whole tensors, and orthogonalises whole matrices: the protocol, and one process's.

:class:`prodigyplus_dist.exchange.MeshExchange` is that of a process that holds pieces of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from prodigyplus.formulas import muon
from prodigyplus.terms.layout import Layout
from prodigyplus.terms.requests import Answers, Asked, Matrices

# How many bytes of updates may be alive at once, by default.
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
        answers = [{name: sum_.local for name, sum_ in sums.items()} for sums in asked]
        return lambda: answers

    def orthogonalize(
        self, asked: Sequence[tuple[Layout, Matrices]]
    ) -> Iterable[tuple[Sequence[int], Sequence[Tensor]]]:
        wholes = [(layout.shape, matrices) for layout, matrices in asked]
        return muon.in_one_process(wholes, self.bucket_bytes)

    def sum_over_stages(self, values: Tensor) -> Tensor:
        return values
