"""The machine that is measured on, and how to take times on it."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch

THREADS = 2
# Seconds between two steps. The threads of OpenMP spin for some 10 ms after their work before they sleep, and
# would take time from the next process. OMP_WAIT_POLICY=passive sends them to sleep at once, but then waking
# them is part of every step: a fused AdamW over small tensors takes 1.8 times as long.
PAUSE = 0.03
BUSY = 0.7  # load above which it warns: threads that wait for one another then lose whole time slices


def described() -> str:
    """The machine in words."""
    name = value_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"{name} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {memory / 1e9:.0f} GB; "
        f"{THREADS} threads, float32; torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}"
    )


def available() -> int:
    """The bytes of memory that processes may still take."""
    if found := value_of("/proc/meminfo", "MemAvailable"):
        return 1024 * int(found.split()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def value_of(file: str, key: str) -> str:
    """The value of a key in a file of the kernel's; empty if there is none."""
    with suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return ""


def warn_if_busy() -> None:
    """Warn if other processes are running."""
    if (load := os.getloadavg()[0]) > BUSY:
        print(f"the load is {load:.1f}: times beside other work say nothing", file=sys.stderr)


def keep_freed_memory() -> None:
    """Have malloc keep freed memory, as it does after activations, instead of returning it to the kernel."""
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)
