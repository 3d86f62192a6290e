"""A step computes what it computes in whatever mode its caller is: autocast, inference, a default device.

Ambient modes change what operators do without a word at the call. So the optimiser leaves them where its
arithmetic begins. (A default device or dtype has no say in it, since every tensor that it makes names its
own.)
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
    """``function`` without gradients, and out of autocast and of inference mode.

    What it makes can be changed in place by whoever calls it, also where its caller is in inference mode.
    """

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        with torch.no_grad(), ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(mode=False))
                stack.enter_context(torch.no_grad())  # which leaving inference mode has ended
            for device_type in _device_types():
                if torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            return function(*args, **kwargs)

    return cast("F", call)


def is_captured(device: torch.device) -> bool:
    """Whether what is launched on ``device`` is recorded into a graph rather than run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _device_types() -> tuple[str, ...]:
    """The kinds of devices that a parameter of this process may be on, and that autocast knows."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def isolated_from_compiler(function: F) -> F:
    """:func:`isolated`, and left as it is by ``torch.compile`` of what calls it."""
    return disable_compiler(isolated(function))
