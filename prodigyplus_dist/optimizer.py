"""The optimiser of sharded parameters: local views, layouts and the exchange; the rule is the other's."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from prodigyplus import driver
from prodigyplus.layout import Layout
from prodigyplus.optimizer import Place, ProdigyPlusScheduleFree
from prodigyplus.options import Options
from prodigyplus.rule import Member, saved_form
from prodigyplus.step import Step
from prodigyplus.stepsize import GroupStep
from prodigyplus_dist.exchange import MeshExchange
from prodigyplus_dist.fsdp import reshard_modules_of
from prodigyplus_dist.fused import Buckets, check_whole
from prodigyplus_dist.layout import layout_of, placements_of
from prodigyplus_dist.replicas import check_replicas


class ShardedProdigyPlusScheduleFree(ProdigyPlusScheduleFree):
    """:class:`prodigyplus.ProdigyPlusScheduleFree` for parameters that are cut into shards.

    Every quantity that the algorithm takes over a whole tensor or group is taken over the whole global
    tensor or group: the run is that of one process, cut into pieces, with the same step size on every rank.

    >>> fully_shard(model)
    >>> optimizer = ShardedProdigyPlusScheduleFree(model.parameters())

    Parameters may be DTensors of any mesh and placement but ``Partial`` (FSDP2, HSDP, tensor and expert
    parallelism, their products, uneven and empty shards), of several meshes, and plain tensors beside them,
    whose replicas must be given equal gradients, as DDP does. Every rank calls :meth:`step`,
    :meth:`state_dict` and :meth:`load_state_dict` together.

    FSDP2 keeps the weights of the root module gathered after a forward pass until a backward pass. Where none
    follows, as after an evaluation, it would train on with the averaged weights it gathered: so wherever the
    optimiser puts other weights into the model, it lets FSDP2 go of what it has gathered.

    A step makes two all-reduces along each mesh axis that cuts a parameter, one along each that copies one,
    and where there are more updates than fit a bucket, one for each half of a bucket: while the sums of one
    half travel, the other is computed. ``use_cautious`` makes one more for each.

    Muon makes one more along each axis that cuts a matrix, and sends matrices: two all-to-alls in bfloat16
    for each bucket of them. Where there are copies, as in HSDP, each has a part of the matrices, and
    broadcasts the results.

    Args:
        params, options: As for :class:`prodigyplus.ProdigyPlusScheduleFree`.
        process_group: A group of ranks each of which holds other parameters in an optimiser of its own with
            as many groups, as the stages of a pipeline do (for Muon, by ``muon_groups`` with ``keep_empty``).
            They share ``d`` and skip steps together, at the price of two small all-reduces a step.
        bucket_bytes: How many bytes of updates may be alive at once; of matrices that are sent too, but at
            least one matrix, with up to seven times that in buffers (see docs/muon.md).
        replicas: The ranks that hold copies of the parameters which are plain tensors, as those of
            ``DistributedDataParallel`` do (its ``process_group``): they share Muon's work. Without it, each
            does all of it.
        all_to_all: Exchange Muon's matrices with all-to-alls. False: point to point, each owner gathering
            and scattering its own, for clusters where all-to-alls are unreliable.
    """

    _buckets: Sequence[Buckets] = ()
    _trained: Set[Tensor] = frozenset()  # the parameters that required gradients at the last step

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        process_group: dist.ProcessGroup | None = None,
        bucket_bytes: int = driver.BUCKET_BYTES,
        replicas: dist.ProcessGroup | None = None,
        all_to_all: bool = True,
        **options: Any,
    ) -> None:
        self._shares_step_size = process_group is not None
        self._exchange: MeshExchange = MeshExchange(
            process_group, bucket_bytes, replicas, all_to_all=all_to_all
        )
        super().__init__(params, *args, **options)

    def _check_owner(self) -> None:
        if not self._shares_step_size:
            super()._check_owner()

    def __getstate__(self) -> dict[str, Any]:
        # torch leaves out what it does not know of; a copy must not go on alone.
        return {**super().__getstate__(), "_exchange": self._exchange}

    def averaged_state_dict(self, model: nn.Module, *, full: bool = False) -> dict[str, Any]:
        """As that of one process, in shards; or whole, to be saved as the model of one process.

        Every rank calls it together.

        Args:
            model: The model whose parameters the optimiser was given, wrapped in what it may be.
            full: Gather every tensor, on the CPU of rank 0, under the names that they have in the model that
                is not wrapped. Other ranks get an empty dict.
        """
        if not full:
            return super().averaged_state_dict(model)
        self._check_model(model)
        with self.averaged_parameters():
            whole = get_model_state_dict(
                model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            # What is not cut is still the model's own, which will be other weights again.
            # Tied weights come as one tensor.
            return {name: v.clone() if isinstance(v, Tensor) else v for name, v in whole.items()}

    def check_replicas(self, replicas: dist.ProcessGroup | None = None) -> None:
        """Check that all ranks agree where they have to; see :func:`prodigyplus_dist.check_replicas`."""
        check_replicas(self, replicas)

    def _has_changed_weights(self) -> None:
        super()._has_changed_weights()
        reshard_modules_of({p for p, _ in self._parameters() if isinstance(p, DTensor)})

    def _attach(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[RemovableHandle]:
        check_whole(model, parameters)
        if not isinstance(model, DistributedDataParallel):
            return self._hooked(parameters)
        # Which parameters no rank has used, DDP knows at the end of a backward pass: then step() does all.
        if not (model.find_unused_parameters or model.static_graph):
            self._buckets = [*self._buckets, Buckets(model, self._weak_take())]
        return []

    def _finish_backward(self) -> None:
        for buckets in self._buckets:
            buckets.consume()

    def _takes_part(self, p: Tensor) -> bool:
        # Where this rank has no gradient others may have one: whether to take part is not its own to decide.
        # One that was frozen since the last step may still have a gradient somewhere; after that, all hear of
        # none.
        return p.requires_grad or p.grad is not None or p in self._trained

    def _members(self, step: Step) -> list[Member]:
        members = super()._members(step)
        self._trained = {p for p, _ in self._parameters() if p.requires_grad}
        return members

    def _member(self, place: Place, grad: Tensor | None, group: GroupStep) -> Member:
        p, present = place.p, grad is not None
        if grad is not None and isinstance(p, DTensor):
            found = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else "a plain tensor"
            if found != (p.device_mesh, p.placements):
                raise RuntimeError(
                    f"{self._name(place)} has placements {p.placements} on {p.device_mesh}, but its gradient "
                    f"is {found}. Give it the parameter's, as FSDP2 does: "
                    "p.grad = p.grad.redistribute(p.device_mesh, p.placements)."
                )
        return self._make_member(place, torch.zeros_like(p) if grad is None else grad, group, present)

    def _check_kind(self, place: Place) -> None:
        p = place.p
        if not isinstance(p, DTensor):
            super()._check_kind(place)
        elif any(placement.is_partial() for placement in p.placements):
            raise RuntimeError(
                f"{self._name(place)} has placements {p.placements}: a Partial parameter has no value to "
                "train."
            )

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _local_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: self._local(value) for key, value in state.items()}

    def _layout_key(self, p: Tensor) -> Hashable:
        return (p.shape, p.device_mesh, p.placements) if isinstance(p, DTensor) else p.shape

    def _new_layout(self, p: Tensor) -> Layout:
        return layout_of(p, self._exchange.replicas)

    def _placed(self, p: Tensor, local: Tensor, key: str, o: Options) -> Tensor:
        if not isinstance(p, DTensor):
            return local
        shape, whole = saved_form(key, tuple(p.shape), o.slice_p)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local,
            p.device_mesh,
            placements_of(p, whole),
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )

    def _piece(self, p: Tensor, saved: Tensor, key: str, o: Options) -> Tensor:
        device = self._local(p).device
        if not isinstance(p, DTensor):
            return super()._piece(p, saved, key, o)
        _, whole = saved_form(key, tuple(p.shape), o.slice_p)
        if isinstance(saved, DTensor) and saved.device_mesh != p.device_mesh:
            saved = saved.full_tensor()
        if isinstance(saved, DTensor):
            return saved.redistribute(p.device_mesh, placements_of(p, whole)).to_local().to(device, copy=True)
        for dim, indices in enumerate(self._layout(p).indices):
            if dim not in whole:
                chosen = torch.tensor(indices, dtype=torch.int64, device="cpu").to(saved.device)
                saved = saved.index_select(dim, chosen)
        return saved.to(device, copy=True)
