"""How kernels are compiled: once for each set of constants, whatever numbers and addresses they get later."""

# No ``from __future__ import annotations``: the annotation of an argument is read below.

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., Any]) -> Any:
    """A kernel for :func:`prodigyplus.device.launches.launch`, which keeps what is compiled by its constants.

    So Triton may not make constants of what else it sees: that a number is 1, or an address a multiple of 16.
    """
    parameters = inspect.signature(function).parameters.values()
    others = [parameter.name for parameter in parameters if parameter.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=others)(function)
