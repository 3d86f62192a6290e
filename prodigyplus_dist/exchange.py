"""Complete sums over shards: all that a round asks for in one all-reduce along each mesh axis it crosses.

The number of collectives depends on the meshes alone, not on how many parameters or groups there are. An
all-reduce gives every rank the same bits, so every rank computes the same numbers from them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from prodigyplus.engine.driver import Asked
from prodigyplus.engine.rule import Answers
from prodigyplus.terms.layout import Layout
from prodigyplus.terms.requests import Matrices
from prodigyplus_dist.layout import MeshLayout
from prodigyplus_dist.orthogonalize import Orthogonalizer


class MeshExchange:
    """The exchange of a process that holds pieces of tensors; see ``Exchange`` in ``engine/driver.py``.

    Args:
        process_group: The ranks that hold other parameters of the same optimiser, or None.
        bucket_bytes: How many bytes of directions may be alive at once; each half of it is a collective more.
        replicas: The ranks that hold copies of plain tensors, or None.
        all_to_all: Whether matrices are sent with all-to-alls; see :class:`Orthogonalizer`.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        bucket_bytes: int,
        replicas: dist.ProcessGroup | None = None,
        *,
        all_to_all: bool = True,
    ) -> None:
        self.bucket_bytes = bucket_bytes
        self.replicas = replicas
        self._process_group = process_group
        self._stages_agree = False  # whether it is known that all have as many groups
        self._orthogonalizer = Orthogonalizer(bucket_bytes, all_to_all=all_to_all)

    def __deepcopy__(self, memo: dict[int, object]) -> MeshExchange:
        return self  # the copy of an optimiser talks to the same ranks

    def complete(self, asked: Sequence[Asked]) -> Callable[[], list[Answers]]:
        answers: list[Answers] = [{name: sum_.local for name, sum_ in sums.items()} for sums in asked]
        # By process group, since meshes may share axes. In the order in which the parameters name them, which
        # is the same on every rank.
        crossing: dict[dist.ProcessGroup, list[tuple[int, str]]] = {}
        for number, sums in enumerate(asked):
            for name, sum_ in sums.items():
                for axis in sum_.axes:
                    crossing.setdefault(cast("dist.ProcessGroup", axis), []).append((number, name))

        def begin(index: int) -> Callable[[], None]:
            group, sums_of = rounds[index]
            wait = _all_reduce([answers[n][name] for n, name in sums_of], group)

            def end() -> None:
                for (n, name), value in zip(sums_of, wait(), strict=True):
                    answers[n][name] = value

            return end

        # What is summed along several axes goes along one after the other: the first one now.
        rounds = list(crossing.items())
        first = begin(0) if rounds else None

        def finish() -> list[Answers]:
            if first is not None:
                first()
            for index in range(1, len(rounds)):
                begin(index)()
            return answers

        return finish

    def orthogonalize(
        self, asked: Sequence[tuple[Layout, Matrices]]
    ) -> Iterable[tuple[Sequence[int], Sequence[Tensor]]]:
        return self._orthogonalizer.orthogonalize(
            [(cast("MeshLayout", layout), matrices) for layout, matrices in asked]
        )

    def sum_over_stages(self, values: Tensor) -> Tensor:
        if self._process_group is None:
            return values
        if not self._stages_agree:
            counts = torch.tensor([len(values), -len(values)], device=values.device)
            dist.all_reduce(counts, dist.ReduceOp.MAX, group=self._process_group)
            if int(counts.sum()):
                raise ValueError(
                    "the optimisers of process_group have different numbers of parameter groups: give all "
                    "as many, of the same options; they may be empty."
                )
            self._stages_agree = True
        return _all_reduce([values], self._process_group)()[0]


def _all_reduce(values: Sequence[Tensor], group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """Begin to sum many tensors over a group, packed into one buffer of the widest of their dtypes.

    Returns:
        What waits for the sums, and gives them.
    """
    dtype = functools.reduce(torch.promote_types, {value.dtype for value in values})
    buffer = torch.cat([value.reshape(-1).to(dtype) for value in values])
    work = dist.all_reduce(buffer, group=group, async_op=True)
    kinds = [(value.shape, value.dtype) for value in values]

    def wait() -> list[Tensor]:
        work.wait()
        pieces = torch.split(buffer, [math.prod(shape) for shape, _ in kinds])
        return [piece.view(shape).to(dtype) for piece, (shape, dtype) in zip(pieces, kinds, strict=True)]

    return wait
