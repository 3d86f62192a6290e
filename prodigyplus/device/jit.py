"""How kernels are compiled and launched.

A kernel is compiled once for each set of constants, whatever numbers and addresses it gets later. Triton is
imported with the first kernel. Without a GPU, ``TRITON_INTERPRET=1`` in the environment of the process has
kernels run on the CPU, slowly: for tests.
"""

# No ``from __future__ import annotations``: the annotation of a kernel's argument is read below.

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
    """A kernel for :func:`launch`, which keeps what is compiled by its constants.

    So Triton may not make constants of what else it sees: that a number is 1, or an address a multiple of 16.
    """
    import triton
    import triton.language as tl

    parameters = inspect.signature(function).parameters.values()
    others = [parameter.name for parameter in parameters if parameter.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=others)(function)


@functools.cache
def interprets() -> bool:
    """Whether Triton runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched for tensors on ``device``."""
    return (device.type == "cuda" or interprets()) and has_triton()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where kernels for ``device`` are launched from."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int, **constants: object) -> None:
    """Launch a kernel.

    Args:
        kernel: One of :func:`kernel`.
        grid: How many programs it runs as.
        arguments: What it is given, in order.
        constants: What it is compiled for, after these; dtypes are torch's. And ``num_warps``.
    """
    if interprets():
        kernel[grid](*arguments, **_options(constants))
        return
    # Triton looks at each argument and constant to find what it has compiled, and takes ten times longer.
    dtypes = [argument.dtype if isinstance(argument, Tensor) else None for argument in arguments]
    key = id(kernel), _driver().active.get_current_device(), *constants.values(), *dtypes
    if key not in _COMPILED:
        options = _options(constants)
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        _COMPILED[key] = compiled, [options[name] for name in kernel.arg_names[len(arguments) :]]
    compiled, last = _COMPILED[key]
    compiled[(*grid, 1, 1)[:3]](*arguments, *last)


# What has been compiled, and the constants at the end of its arguments.
_COMPILED: dict[Hashable, tuple[Any, list[object]]] = {}


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver


def _options(constants: Mapping[str, object]) -> dict[str, object]:
    """Constants as Triton takes them."""
    of_torch = (torch.dtype, type(None))
    options = {
        name: _triton_dtype(value) if isinstance(value, of_torch) else value
        for name, value in constants.items()
    }
    # Not fused into multiply-adds, so that the CPU and the GPU round alike.
    return {**options, "enable_fp_fusion": False}


@functools.cache
def _triton_dtype(dtype: torch.dtype | None) -> Any:
    import triton.language as tl

    # What is not there is never read; the kernel needs a type for its address all the same.
    return {torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}.get(dtype, tl.float32)  # type: ignore[arg-type]
