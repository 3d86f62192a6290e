"""Every private name of torch that this package uses, each with what breaks without it.

``tests/single/test_torch_private.py`` says which of them are gone when torch changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., object])

# Options of Inductor, torch.compile's code generator, which may be renamed. Without the first two it stores
# directions in memory, which should be computed where they are used; without the last, bfloat16 intermediates
# are not rounded between operators, as they are without the compiler.
_READS_OF_A_DIRECTION = 5
INDUCTOR_OPTIONS: dict[str, object] = {
    # A value with more reads is stored if it is used twice: the factors' roots should be, directions not.
    "realize_reads_threshold": _READS_OF_A_DIRECTION,
    "realize_opcount_threshold": 1000,
    "emulate_precision_casts": True,
}

# How often torch.compile may compile one function; torch's own limit is 8.
_RECOMPILE_LIMIT = 256

# The base classes of all convolutions, and of batch and instance norms: torch has no public ones. Without
# them muon_groups would have to list every class, and would miss users' own.
CONVOLUTION: type[Any] = nn.modules.conv._ConvNd
BATCH_OR_INSTANCE_NORM: type[nn.Module] = nn.modules.batchnorm._NormBase


def compiled(function: F) -> F:
    """Compile ``function``: a graph for each kind of its arguments, with symbolic sizes.

    With torch's own limit, a ninth kind would be an error. Before torch 2.12 the limit is not an argument of
    ``torch.compile``, but a private setting of the whole process, and so is changed during each call.
    """
    settings: dict[str, Any] = {"dynamic": True, "fullgraph": True, "options": _inductor_options()}
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    if has_limit:
        settings["recompile_limit"] = _RECOMPILE_LIMIT
    made = cast("F", torch.compile(function, **settings))
    if has_limit:
        return made

    from torch._dynamo import config

    @functools.wraps(function)
    def call(*args: object) -> object:
        with config.patch(recompile_limit=_RECOMPILE_LIMIT):
            return made(*args)

    return cast("F", call)


def _inductor_options() -> dict[str, object]:
    """``INDUCTOR_OPTIONS`` without the one that the code generator for CPUs of torch 2.8 fails on."""
    from torch._inductor.codegen.cpp import CppVecOverrides

    emulates = "use_compute_types" in inspect.signature(CppVecOverrides.to_dtype).parameters
    left_out = () if emulates else ("emulate_precision_casts",)
    return {name: value for name, value in INDUCTOR_OPTIONS.items() if name not in left_out}


def disable_compiler(function: F) -> F:
    """Exclude ``function`` when its callers are compiled, as torch.optim does with its own.

    The public ``torch.compiler.disable`` would import the compiler with the package, which takes a second.
    """
    from torch._compile import _disable_dynamo

    return cast("F", _disable_dynamo(function))


def is_fsdp1_parameter(p: Tensor) -> bool:
    """Whether a parameter is a flat parameter of FSDP1. Without it, such a model would train wrongly."""
    return bool(getattr(p, "_fsdp_flattened", False))


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place. Without it, changes by others would go unnoticed."""
    return tensor._version


def foreach_copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """``target.copy_(source)`` of many small tensors in one call. Without it, a step of many takes longer."""
    torch._foreach_copy_(list(targets), list(sources))
