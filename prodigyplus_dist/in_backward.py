"""Moving parameters within the backward pass, where their gradients are whole.

Under FSDP2 that is where its own hooks run, after the reduce-scatter. Under DDP no hook of a parameter sees
the average, since DDP sums gradients bucket by bucket: what sees it is DDP's communication hook.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from prodigyplus.engine.in_backward import Take, hook_parameters
from prodigyplus_dist.torch_private import fsdp_groups_of

Average: TypeAlias = "torch.futures.Future[Tensor]"


def check_whole(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a parameter whose gradient is not whole where a hook sees it.

    By what every rank knows, so that all refuse alike.

    Raises:
        ValueError: Neither FSDP2 nor DDP sums its gradients.
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
    on_a_device = any(p.device.type != "cpu" for p in parameters.values())
    if on_a_device and len({group._is_hsdp for group in groups}) > 1:
        raise ValueError(
            "fuse_backward: some modules are sharded, others sharded and replicated, and FSDP2 reduces their "
            "gradients on streams that do not wait for each other: give all the same kind of mesh, or set "
            "fused_back_pass=False."
        )


class Buckets:
    """DDP's buckets of gradients: averaged as they come, consumed when the next one does, or at the end.

    So the all-reduce of one runs while the backward pass fills the next.

    Args:
        model: Whose buckets they are. It may have no other communication hook.
        take: Moves a parameter by its gradient.
    """

    def __init__(self, model: DistributedDataParallel, take: Take) -> None:
        self._take = take
        self._waiting: list[tuple[Average, list[Tensor], list[Tensor]]] = []
        group = model.process_group

        # DDP looks at the annotations themselves: a module that makes them texts could register no hook.
        def add(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
            buffer = bucket.buffer().mul_(1 / group.size())  # as DDP does
            work = dist.all_reduce(buffer, group=group, async_op=True)
            average: Average = work.get_future().then(lambda future: future.value()[0])
            self.consume()
            self._waiting.append((average, bucket.parameters(), bucket.gradients()))
            return average

        model.register_comm_hook(None, add)

    def consume(self) -> None:
        """Move the parameters of the buckets that came so far."""
        waiting, self._waiting = self._waiting, []
        for average, parameters, gradients in waiting:
            average.wait()
            for p, grad in zip(parameters, gradients, strict=True):
                self._take(p, grad)


class MeshHooks:
    """Hooks where gradients are whole; see :class:`prodigyplus.engine.in_backward.Hooks`."""

    def __init__(self) -> None:
        self._buckets: list[Buckets] = []

    def __deepcopy__(self, memo: dict[int, object]) -> "MeshHooks":
        return MeshHooks()  # those of a model move the parameters of one optimiser

    def __getstate__(self) -> dict[str, Any]:
        return {"_buckets": []}

    def attach(self, model: nn.Module, parameters: Mapping[str, Tensor], take: Take) -> list[RemovableHandle]:
        check_whole(model, parameters)
        if not isinstance(model, DistributedDataParallel):
            return hook_parameters(parameters, take)
        # Which parameters no rank has used, DDP knows at the end of a backward pass: then step() does all.
        if not (model.find_unused_parameters or model.static_graph):
            self._buckets.append(Buckets(model, take))
        return []

    def finish(self) -> None:
        for buckets in self._buckets:
            buckets.consume()
