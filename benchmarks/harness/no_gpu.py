"""Triton without a GPU: kernels are compiled and bound as for a launch, but do not run."""

from __future__ import annotations

import os
import types
from typing import Any

from prodigyplus.device import jit

# Ampere: the first GPUs that multiply bfloat16.
CAPABILITY = 80


def pretend_gpu() -> None:
    """Let kernels take CPU tensors from now on, in this process."""
    os.environ.pop("TRITON_INTERPRET", None)
    jit.interprets.cache_clear()
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    # What Triton asks of a driver: a module, a function, its registers, spills and threads; and limits.
    utils = types.SimpleNamespace(
        load_binary=lambda *_: (1, 1, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 1 << 17}
    )
    pretended: Any = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", CAPABILITY, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        utils=utils,
        launcher_cls=lambda *_: lambda *_: None,
    )
    driver.set_active(pretended)
    jit.runs_on = lambda device: True
