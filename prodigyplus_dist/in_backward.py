"""Update parameters within the backward pass, at the point where their gradients have been reduced.

Under FSDP2 post-accumulate hooks of parameters run after the reduce-scatter. Under DDP they run before the
gradient is averaged, since DDP reduces bucket by bucket: there a communication hook of DDP sees the average.
"""

from collections.abc import Mapping
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from prodigyplus.engine.in_backward import Take, hook_parameters
from prodigyplus_dist.torch_private import HOOKS_WAIT_FOR_OFFLOAD, fsdp_groups_of

Average: TypeAlias = "torch.futures.Future[Tensor]"


def check_gradients_are_reduced(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuse models in which DDP keeps each gradient twice, or a hook sees a gradient before it is reduced.

    Decides by what all ranks know, so that all raise or none does.

    Args:
        model: The model whose backward pass is to be hooked, wrapped in DDP if it is.
        parameters: The parameters to be updated in it, by their names.

    Raises:
        ValueError: Neither FSDP2 nor DDP reduces the gradient of one of them, or they reduce it
            in a way that does not work with hooks.
    """
    if isinstance(model, DistributedDataParallel):
        if not model.gradient_as_bucket_view:
            raise ValueError(
                "fuse_backward: DistributedDataParallel keeps every gradient twice, in its buckets and "
                "beside them, so that nothing is won: pass it gradient_as_bucket_view=True."
            )
        return
    groups = fsdp_groups_of(model.modules())
    managed = {p.sharded_param for group in groups for p in group.fsdp_params}
    for name, p in parameters.items():
        if isinstance(p, DTensor) and p not in managed:
            raise ValueError(
                f"fuse_backward: parameter {name!r} is a DTensor that FSDP2 does not manage, so ranks may "
                "have gradients of other parameters, or in another order, and wait for each other: wrap the "
                "model with fully_shard, or set fused_back_pass=False."
            )
        if not isinstance(p, DTensor) and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"fuse_backward: parameter {name!r} is a plain tensor on one of {dist.get_world_size()} "
                "ranks, and nothing sums its gradient over them before a hook sees it: pass the model "
                "wrapped with fully_shard or DistributedDataParallel, or set fused_back_pass=False."
            )
    if not HOOKS_WAIT_FOR_OFFLOAD and any(
        fsdp_param.offload_to_cpu and fsdp_param.pin_memory
        for group in groups
        for fsdp_param in group.fsdp_params
    ):
        raise ValueError(
            "fuse_backward: before torch 2.13, FSDP2 runs a parameter's hooks while its gradient is still on "
            "its way to pinned memory: pass CPUOffloadPolicy(pin_memory=False), or set fused_back_pass=False."
        )
    on_a_device = any(p.device.type != "cpu" for p in parameters.values())
    if on_a_device and len({group._is_hsdp for group in groups}) > 1:
        raise ValueError(
            "fuse_backward: some modules are sharded, others sharded and replicated, and FSDP2 reduces their "
            "gradients on streams that do not wait for each other: give all the same kind of mesh, or set "
            "fused_back_pass=False."
        )


class Buckets:
    """DDP's buckets of gradients. A full one is averaged at once; its parameters move when the next is full.

    So the all-reduce of one runs while the backward pass fills the next. :meth:`consume` ends the last one.

    Args:
        model: The wrapped model, which may have no other communication hook.

    Attributes:
        takes: Functions that update a parameter by its gradient, of all optimisers of the model; each returns
            whether it has done so.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.takes: list[Take] = []
        self._waiting: list[tuple[Average, list[Tensor], list[Tensor]]] = []
        group = model.process_group

        # DDP compares the annotations as objects, so this module may not import annotations from __future__.
        def average_bucket(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
            buffer = bucket.buffer().mul_(1 / group.size())  # before the sum, as DDP does
            work = dist.all_reduce(buffer, group=group, async_op=True)
            average: Average = work.get_future().then(lambda future: future.value()[0])
            self.consume()
            self._waiting.append((average, bucket.parameters(), bucket.gradients()))
            return average

        model.register_comm_hook(None, average_bucket)

    def consume(self) -> None:
        """Wait for the buckets added so far, and update their parameters."""
        waiting, self._waiting = self._waiting, []
        for average, parameters, gradients in waiting:
            average.wait()
            for p, grad in zip(parameters, gradients, strict=True):
                for take in self.takes:
                    if take(p, grad):
                        break


# DDP takes one communication hook for a model, which serves all optimisers of its parameters.
_BUCKETS: WeakKeyDictionary[DistributedDataParallel, Buckets] = WeakKeyDictionary()


class MeshHooks:
    """Hooks that run once gradients have been reduced; see :class:`prodigyplus.engine.in_backward.Hooks`."""

    def __init__(self) -> None:
        self._attached: WeakKeyDictionary[DistributedDataParallel, Buckets] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, object]) -> "MeshHooks":
        return MeshHooks()  # hooks on a model update one optimiser's parameters

    def __reduce__(self) -> "tuple[type[MeshHooks], tuple[()]]":
        return MeshHooks, ()

    def attach(self, model: nn.Module, parameters: Mapping[str, Tensor], take: Take) -> list[RemovableHandle]:
        check_gradients_are_reduced(model, parameters)
        if not isinstance(model, DistributedDataParallel):
            return hook_parameters(parameters, take)
        # With these options, DDP learns which parameters are unused only after the backward pass, so step()
        # moves all. A group that comes later is served by the hook that is there.
        if not (model.find_unused_parameters or model.static_graph or model in self._attached):
            buckets = self._attached[model] = _BUCKETS.get(model) or Buckets(model)
            _BUCKETS[model] = buckets
            buckets.takes.append(take)
        return []

    def finish(self) -> None:
        for buckets in self._attached.values():
            buckets.consume()
