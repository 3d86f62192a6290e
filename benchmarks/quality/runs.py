"""Runs: what each one is, and a file with those that are finished."""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import ROOT, peers, results
from .peers import Entry, Setting
from .results import Row
from .task import Setup, Task
from .train import train

CACHE = Path("runs/quality")  # for pretrained models


@dataclass(frozen=True, slots=True)
class Run:
    """A run that may be done already."""

    task: Task
    entry: Entry
    setting: Setting
    seed: int
    size: str = "small"
    device: str = "cpu"

    @property
    def identity(self) -> Row:
        """What identifies it in the results: runs with equal identities are the same."""
        scale = self.task.scales[self.size]
        return {
            "task": self.task.name,
            "size": self.size,
            "scale": {"steps": scale.steps, "batch": scale.batch, **scale.shape},
            "optimizer": self.entry.name,
            "setting": asdict(self.setting),
            "seed": self.seed,
            "device": self.device,
        }

    @property
    def key(self) -> str:
        """The same as one string."""
        return results.key(self.identity)

    def row(self, folder: Path) -> Row:
        """Train; returns identity, measurements and environment. ``folder`` is for pretrained models."""
        setup = Setup(self.task.scales[self.size], self.seed, torch.device(self.device), folder)
        measured = train(self.task, setup, self.entry, self.setting)
        package = {"package": peers.version(self.entry)}
        return {**self.identity, **measured, "environment": {**environment(self.device), **package}}


def finish(
    out: Path, runs: Iterable[Run], done: dict[str, Row], *, folder: Path = CACHE, until: float = math.inf
) -> bool:
    """Train the runs that are not done, in order; each becomes a line of a file as soon as it is finished.

    Args:
        out: The file.
        runs: All runs.
        done: The runs that the file has, by their keys. Finished ones are added.
        folder: For pretrained models.
        until: No run starts after this time, in seconds of ``time.monotonic``.

    Returns:
        Whether all are done.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if run.key in done:
            continue
        if time.monotonic() > until:
            return False
        row = run.row(folder)
        results.append(out, row)
        done[run.key] = row
        print(line(row), flush=True)
    return True


@cache
def environment(device: str) -> dict[str, Any]:
    """The machine and the versions."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def processor() -> str:
    """The name of the CPU."""
    with suppress(OSError):
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def line(row: Row) -> str:
    """A finished run in words."""
    setting = row["setting"]
    how = "" if setting["rate"] is None else f" {setting['rate']:g}{' with warm-up' * setting['warm_up']}"
    loss = "diverged" if row["loss"] is None else f"{row['loss']:.5g}"
    accuracy = "" if row["accuracy"] is None else f", accuracy {row['accuracy']:.2%}"
    what = f"{row['task']}, {row['optimizer']}{how}, seed {row['seed']}"
    return f"{what}: {loss}{accuracy}, {row['cpu_seconds']} s of the CPU"
