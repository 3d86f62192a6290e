"""How kernels are compiled and launched.

A kernel is compiled once for each set of constants and dtypes, whatever numbers and addresses it gets later.
Triton is imported with the first kernel. For tests without a GPU, set ``TRITON_INTERPRET=1`` in the
environment: kernels then run on the CPU, slowly.
"""

# No ``from __future__ import annotations``: kernel() reads the annotations of a kernel's arguments.

import contextlib
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor


def kernel(function: Callable[..., Any]) -> Any:
    """A Triton kernel for :func:`launch`, which caches compiled kernels by constants and dtypes only.

    So Triton must not specialise on anything else, such as a number that is 1 or an address that is a
    multiple of 16.
    """
    import triton
    import triton.language as tl

    parameters = inspect.signature(function).parameters.values()
    others = [parameter.name for parameter in parameters if parameter.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=others)(function)


@functools.cache
def interprets() -> bool:
    """Whether Triton's interpreter runs kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched for tensors on ``device``."""
    return (device.type == "cuda" or interprets()) and has_triton()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which ``device`` is the current device, so that kernels are launched on it."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int, **constants: object) -> None:
    """Launch a kernel.

    Args:
        kernel: A kernel made by :func:`kernel`.
        grid: The number of programs along each axis.
        arguments: Its arguments, in order.
        constants: Its ``tl.constexpr`` arguments, which come last, with torch's dtypes; and ``num_warps``.
    """
    if interprets():
        kernel[grid](*arguments, **_options(constants))
        return
    # To find a compiled kernel, Triton would inspect every argument, which takes ten times longer.
    dtypes = [argument.dtype if isinstance(argument, Tensor) else None for argument in arguments]
    key = id(kernel), _driver().active.get_current_device(), *constants.values(), *dtypes
    if key not in _COMPILED:
        options = _options(constants)
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        _COMPILED[key] = compiled, [options[name] for name in kernel.arg_names[len(arguments) :]]
    compiled, last = _COMPILED[key]
    compiled[(*grid, 1, 1)[:3]](*arguments, *last)


# Compiled kernels, with the constants to be passed after the arguments.
_COMPILED: dict[Hashable, tuple[Any, list[object]]] = {}


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver


def _options(constants: Mapping[str, object]) -> dict[str, object]:
    """Constants in the form that Triton takes."""
    of_torch = (torch.dtype, type(None))
    options = {
        name: _triton_dtype(value) if isinstance(value, of_torch) else value
        for name, value in constants.items()
    }
    # No fused multiply-adds, so that GPUs round as the CPU does, except where they divide or take roots.
    return {**options, "enable_fp_fusion": False}


@functools.cache
def _triton_dtype(dtype: torch.dtype | None) -> Any:
    import triton.language as tl

    # None: an absent tensor is never read, but the kernel still needs a type for its address.
    return {torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}.get(dtype, tl.float32)  # type: ignore[arg-type]
