"""Isolation from the caller's modes: a step gives the same result under autocast or inference mode.

Such modes change what operators do, with nothing to see at the call. So the optimiser leaves them before its
arithmetic begins. (A default device or dtype has no effect, since every tensor is created with its own.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar, cast

import torch

from prodigyplus.torch_private import disable_compiler

F = TypeVar("F", bound=Callable[..., object])


def isolated(function: F) -> F:
    """``function``, run without gradients and outside autocast and inference mode.

    The caller can change the tensors that it returns in place, even if the caller is in inference mode.
    """

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        with torch.no_grad(), ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(mode=False))
                stack.enter_context(torch.no_grad())  # leaving inference mode has ended it
            for device_type in _device_types():
                if torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            return function(*args, **kwargs)

    return cast("F", call)


def is_captured(device: torch.device) -> bool:
    """Whether work launched on ``device`` is being captured into a CUDA graph instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _device_types() -> tuple[str, ...]:
    """The device types of this process's parameters, as autocast names them."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def isolated_from_compiler(function: F) -> F:
    """As :func:`isolated`; also, ``torch.compile`` of a caller does not trace into it."""
    return disable_compiler(isolated(function))
