"""Every private name of torch that this package uses, each with what breaks without it.

``tests/dist/test_torch_private.py`` says which of them are gone when torch changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

# Whether FSDP2, if a parameter has hooks, waits until its gradient has reached the CPU. Without it, a hook
# would read what has not arrived.
HOOKS_WAIT_FOR_OFFLOAD: bool = torch.__version__ >= "2.13"  # compared as versions


# The types of tensors that are no wrappers of others.
_PLAIN = frozenset((Tensor, nn.Parameter))


def fsdp_groups_of(modules: Iterable[nn.Module]) -> list[Any]:
    """FSDP2's own groups of the parameters that it manages in these modules.

    Each has ``is_sharded``, ``_is_hsdp``, and ``fsdp_params`` with their ``sharded_param`` and how they are
    offloaded.
    Without it, ``fuse_backward`` would accept parameters whose gradients are not whole when hooks see them.
    """
    return [group for module in modules for group in _fsdp_groups(module)]


def reshard_modules_of(parameters: Iterable[Tensor]) -> None:
    """Free what FSDP2 has gathered of sharded parameters, whose values have changed since.

    Without it, a module would go on with the weights that it gathered before they changed. FSDP2 keeps a
    table of its modules; a parameter does not know its module.

    Args:
        parameters: Those whose values have changed, as the optimiser has them; read only if a module has
            gathered something.
    """
    gathered = [
        module for module in _fsdp_modules() if not all(group.is_sharded for group in _fsdp_groups(module))
    ]
    changed = {*parameters} if gathered else set()
    for module in gathered:
        if any(p.sharded_param in changed for group in _fsdp_groups(module) for p in group.fsdp_params):
            module.reshard()


def _fsdp_modules() -> Iterator[FSDPModule]:
    """Every module of this process that FSDP2 manages."""
    return (module for module in [*_composable_state._module_state_mapping] if isinstance(module, FSDPModule))


def _fsdp_groups(module: object) -> list[Any]:
    if not isinstance(module, FSDPModule):
        return []
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return [*state._fsdp_param_groups]
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # up to torch 2.10: one, or None


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The local tensors of DTensors; others as they are.

    Without it, ``to_local()`` of each would take most of the host's time in a step of many parameters.
    """
    found = [tensor._local_tensor if type(tensor) is DTensor else tensor for tensor in tensors]
    if not _PLAIN.issuperset(map(type, found)):
        found = [_wrapped(tensor) for tensor in found]
    return found


def _wrapped(tensor: Tensor) -> Tensor:
    """What a tensor of another class wraps, if that is one tensor of the same shape and dtype; else itself.

    Under FSDP2, the weights of torchao's FP8 training are such wrappers: they gather themselves in FP8. Their
    values are those of the tensor that they wrap, which has memory that kernels can address.
    """
    # An AsyncCollectiveTensor wraps what has not arrived; the first operator on it waits.
    if isinstance(tensor, AsyncCollectiveTensor) or not hasattr(tensor, "__tensor_flatten__"):
        return tensor
    names, _ = tensor.__tensor_flatten__()
    inner = [getattr(tensor, name) for name in names]
    alike = [value for value in inner if value.shape == tensor.shape and value.dtype == tensor.dtype]
    return alike[0] if len(alike) == 1 else tensor


def split(placement: Placement, tensor: Tensor, count: int) -> Sequence[Tensor]:
    """``tensor`` in ``count`` pieces, as a placement shards it, strided ones included.

    Without it, the indices of a shard would have to be computed separately for each kind of placement.
    """
    pieces, _ = placement._split_tensor(tensor, count, with_padding=False, contiguous=False)  # type: ignore[attr-defined]
    result: Sequence[Tensor] = pieces
    return result


def groups_of_this_rank() -> int:
    """How many process groups this rank is in, by which torch names the next one.

    Without it, ranks that are in different numbers of groups could not make a group together.
    """
    return len(dist.distributed_c10d._world.pg_names)


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """The timeout of a process group; None for torch's fake backend, which never waits.

    Without it, groups made of others would wait half an hour, torch's default, whatever the user chose.
    """
    options = group._get_backend(device).options
    return None if options is None else options._timeout


def object_device() -> torch.device:
    """The device that the default group sends Python objects from; the same on all ranks.

    Without it, a rank that has no parameters would not know whether to send from the host or from a device.
    """
    return torch.device(dist.distributed_c10d._get_object_coll_device())
