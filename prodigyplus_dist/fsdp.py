"""What FSDP2 has no public name for: the modules that manage given parameters, and their groups of those."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.fsdp import FSDPModule


def groups_of(modules: Iterable[nn.Module]) -> list[Any]:
    """FSDP2's own groups of the parameters that it manages in modules."""
    return [group for module in modules for group in _groups(module)]


def reshard_modules_of(parameters: Collection[Tensor]) -> None:
    """Free what FSDP2 has gathered of sharded parameters, whose values have changed since.

    Args:
        parameters: As the optimiser has them, sharded.
    """
    for module in _all_modules() if parameters else ():
        if any(p.sharded_param in parameters for group in _groups(module) for p in group.fsdp_params):
            module.reshard()


def _all_modules() -> Iterator[FSDPModule]:
    """Every module of this process that FSDP2 manages."""
    # FSDP2 keeps a table of its modules; parameters do not know theirs.
    return (module for module in [*_composable_state._module_state_mapping] if isinstance(module, FSDPModule))


def _groups(module: object) -> list[Any]:
    if not isinstance(module, FSDPModule):
        return []
    state = module._get_fsdp_state()
    groups: list[Any] = state._fsdp_param_groups
    return groups
