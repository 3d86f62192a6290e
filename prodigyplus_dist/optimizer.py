"""The optimiser for sharded parameters: its placement, exchange and hooks; the rest is inherited."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from prodigyplus import checkpoint
from prodigyplus.exchange import BUCKET_BYTES
from prodigyplus.optimizer import ProdigyPlusScheduleFree
from prodigyplus.options import whole_number
from prodigyplus_dist.exchange import MeshExchange
from prodigyplus_dist.in_backward import MeshHooks
from prodigyplus_dist.placement import MeshTensors
from prodigyplus_dist.replicas import check_replicas


class ShardedProdigyPlusScheduleFree(ProdigyPlusScheduleFree):
    """:class:`prodigyplus.ProdigyPlusScheduleFree` for parameters that are cut into shards.

    Every sum over a tensor or group is taken over the whole, global tensor or group: the ranks together
    compute what one process would, with the same step size on every rank.

    >>> fully_shard(model)
    >>> optimizer = ShardedProdigyPlusScheduleFree(model.parameters())

    Parameters may be DTensors with any placement except ``Partial``, on one or several meshes (FSDP2, HSDP,
    tensor and expert parallelism and their combinations, with uneven and empty shards). Beside them may be
    plain tensors, whose replicas must get equal gradients, as under DDP. (FSDP2 does not reduce the gradients
    of its ``ignored_params``: do so before :meth:`step`, which warns otherwise.) All ranks must call
    :meth:`step`, :meth:`state_dict` and :meth:`load_state_dict` together.

    FSDP2 keeps the root module's weights gathered from a forward pass until a backward pass. If none follows,
    as in an evaluation, training would continue with the averaged weights that were gathered. So whenever the
    optimiser puts other weights into the model, it makes FSDP2 free what it has gathered.

    A step makes two all-reduces along each mesh axis that cuts a parameter, and one along each axis that only
    copies. If the updates do not fit ``bucket_bytes``, the second is made for each bucket of half that size:
    the sums of one bucket travel while the next is computed. ``use_cautious`` adds one for each bucket.

    Muon adds one along each axis that cuts a matrix, and sends matrices, by two all-to-alls in bfloat16 for
    each ``bucket_bytes`` of them. Where there are copies, as in HSDP, each copy orthogonalises part of the
    matrices, and broadcasts the results.

    Args:
        params, options: As for :class:`prodigyplus.ProdigyPlusScheduleFree`.
        process_group: Ranks that each hold different parameters, in an optimiser with the same number of
            groups, such as the stages of a pipeline (for Muon, use ``muon_groups`` with ``keep_empty``). They
            share ``d`` and skip steps together, at the cost of two small all-reduces a step.
        bucket_bytes: How many bytes of updates may be alive at once, and how many bytes of matrices Muon
            sends at once (at least one matrix; buffers take up to seven times as much: see docs/muon.md).
        replicas: The ranks that hold copies of the parameters that are plain tensors, such as the
            ``process_group`` of ``DistributedDataParallel``: they share Muon's work. Without it, each rank
            does all of it.
        all_to_all: Exchange Muon's matrices with all-to-alls. False: point to point, each owner gathering
            and scattering its own, for clusters where all-to-alls are unreliable.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        process_group: dist.ProcessGroup | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        replicas: dist.ProcessGroup | None = None,
        all_to_all: bool = True,
        **options: Any,
    ) -> None:
        if whole_number(0)(bucket_bytes) is None:
            raise ValueError(f"bucket_bytes={bucket_bytes!r}: must be a whole number, 0 or greater.")
        exchange = MeshExchange(process_group, bucket_bytes, all_to_all=all_to_all)
        self._set_up(MeshTensors(replicas), exchange, MeshHooks(), shares_d=process_group is not None)
        super().__init__(params, *args, **options)

    def averaged_state_dict(self, model: nn.Module, *, full: bool = False) -> dict[str, Any]:
        """``model.state_dict()`` with the averaged weights x, in shards; or whole, as one process saves it.

        All ranks call it together.

        Args:
            model: The model whose parameters the optimiser was given, wrapped or not.
            full: Gather every tensor, one after the other, and keep copies on the CPU of the first rank of
                the model's meshes (rank 0, or in a pipeline the first of each stage), under their names in
                the unwrapped model. Other ranks get an empty dict.
        """
        entries = super().averaged_state_dict(model)
        if not full:
            return entries
        gathered = (
            (name, value.full_tensor() if isinstance(value, DTensor) else value)
            for name, value in entries.items()
        )
        if self._keeps_whole(entries.values()):
            return checkpoint.exported(gathered, model)
        for _ in gathered:  # all ranks gather together
            pass
        return {}

    def _keeps_whole(self, entries: Iterable[Any]) -> bool:
        """Whether this rank keeps the whole tensors that ranks gather together.

        Args:
            entries: Those of the model's state dict.
        """
        meshes = {entry.device_mesh for entry in entries if isinstance(entry, DTensor)}
        # Without meshes, all ranks have the same tensors, unless they are said to have others.
        if meshes or cast("MeshExchange", self._exchange).process_group is not None:
            return not any(any(mesh.get_coordinate() or ()) for mesh in meshes)
        return not dist.is_initialized() or dist.get_rank() == 0

    def check_replicas(self, replicas: dist.ProcessGroup | None = None) -> None:
        """Check that all ranks agree where they have to; see :func:`prodigyplus_dist.check_replicas`."""
        check_replicas(self, replicas)
