"""Complete sums over shards: all sums of a round in one all-reduce along each mesh axis.

The number of collectives depends on the meshes alone, not on how many parameters or groups there are. An
all-reduce gives every rank the same bits, so every rank computes the same numbers from them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from prodigyplus.reporting import is_called_from
from prodigyplus.terms.layout import Layout
from prodigyplus.terms.requests import Answers, Asked, Matrices, local_answers
from prodigyplus_dist import agreement
from prodigyplus_dist.agreement import Agreement
from prodigyplus_dist.layout import MeshLayout
from prodigyplus_dist.orthogonalize import Orthogonalizer
from prodigyplus_dist.transport import packed, unpacked


class MeshExchange:
    """The :class:`prodigyplus.exchange.Exchange` of a process that holds pieces of tensors.

    Args:
        process_group: The ranks that share one step size and hold other parameters, as pipeline stages do.
        bucket_bytes: How many bytes of directions may be alive at once; each half of it takes a collective.
        all_to_all: Whether matrices are sent with all-to-alls; see :class:`Orthogonalizer`.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        bucket_bytes: int,
        *,
        all_to_all: bool = True,
    ) -> None:
        self.bucket_bytes = bucket_bytes
        self.process_group = process_group
        self._agreement: Agreement | None = None  # of the last round that compared numbers
        self._stages_agree = False  # whether all optimisers are known to have the same number of groups
        self._orthogonalizer = Orthogonalizer(bucket_bytes, all_to_all=all_to_all)

    def __deepcopy__(self, memo: dict[int, object]) -> MeshExchange:
        return self  # the copy of an optimiser communicates with the same ranks

    def complete(self, asked: Sequence[Asked]) -> Callable[[], list[Answers]]:
        answers = local_answers(asked)
        # By process group, since meshes may share axes, and by device, since only some may be offloaded; in
        # order of first use, the same on every rank.
        buffers: dict[tuple[dist.ProcessGroup, torch.device], list[tuple[int, str]]] = {}
        for index, sums in enumerate(asked):
            for name, sum_ in sums.items():
                for axis in sum_.axes:
                    key = cast("dist.ProcessGroup", axis), sum_.local.device
                    buffers.setdefault(key, []).append((index, name))

        def begin(key: tuple[dist.ProcessGroup, torch.device]) -> Callable[[], None]:
            wait = _all_reduce([answers[index][name] for index, name in buffers[key]], key[0])

            def end() -> None:
                for (index, name), value in zip(buffers[key], wait(), strict=True):
                    answers[index][name] = value

            return end

        # One after the other, since a sum may need several: the first begins now, the others later.
        keys = list(buffers)
        end_first = begin(keys[0]) if keys else None

        def finish() -> list[Answers]:
            if end_first is not None:
                end_first()
            for key in keys[1:]:
                begin(key)()
            return answers

        return finish

    def complete_and_compare(self, asked: Sequence[Asked], step_sizes: Callable[[], Tensor]) -> list[Answers]:
        # With a process group, whole tensors may be others on other ranks, such as experts.
        compared = agreement.requests(step_sizes, asked, compare_whole=self.process_group is None)
        *answers, of_all = self.complete([*asked, compared])()
        self._agreement = Agreement.of(compared, of_all) or self._agreement
        return answers

    def differing(self) -> dict[str, Tensor]:
        return {} if self._agreement is None else self._agreement.differing()

    def orthogonalize(
        self, requests: Sequence[tuple[Layout, Matrices]]
    ) -> Iterable[tuple[Sequence[int], Sequence[Tensor]]]:
        return self._orthogonalizer.orthogonalize(
            [(cast("MeshLayout", layout), matrices) for layout, matrices in requests]
        )

    def sum_over_stages(self, values: Tensor) -> Tensor:
        # torch's checkpoint helpers make a step where an optimiser has no state, maybe on one stage alone.
        if self.process_group is None or is_called_from("torch.distributed.checkpoint.state_dict"):
            return values
        if not self._stages_agree:
            counts = torch.tensor([len(values), -len(values)], device=values.device)
            dist.all_reduce(counts, dist.ReduceOp.MAX, group=self.process_group)
            if int(counts.sum()):
                raise ValueError(
                    "the optimisers of process_group have different numbers of parameter groups: give all "
                    "as many, of the same options; they may be empty."
                )
            self._stages_agree = True
        return _all_reduce([values], self.process_group)()[0]


def _all_reduce(values: Sequence[Tensor], group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """Begin to sum tensors over a group, packed into one buffer of the dtype that all promote to.

    Returns:
        A function that waits for the sums and returns them, in the shapes and dtypes of ``values``.
    """
    dtype = functools.reduce(torch.promote_types, {value.dtype for value in values})
    buffer = packed(values, like=values[0].new_empty(0, dtype=dtype))
    work = dist.all_reduce(buffer, group=group, async_op=True)
    shapes, dtypes = [value.shape for value in values], [value.dtype for value in values]

    def wait() -> list[Tensor]:
        work.wait()
        return [sum_.to(dtype) for sum_, dtype in zip(unpacked(buffer, shapes), dtypes, strict=True)]

    return wait
