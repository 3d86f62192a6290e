"""SIGTERM, by which schedulers announce that they will end a run: heard between two steps."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

# What shells call a process that SIGTERM has ended: the launcher sees that the run is not at its end.
STATUS = 128 + signal.SIGTERM


class Interruption:
    """SIGTERM, sent to any process of the run, heard by all of them after the same step.

    The processes ask each other after every step, and read the answers to what they asked a step before: so
    none waits for another. It is listened to within a ``with`` block.

    >>> with Interruption() as interruption:
    ...     for batch in batches:
    ...         take_step(batch)
    ...         if interruption.heard():
    ...             break
    """

    def __init__(self) -> None:
        self._told = False
        self._asked: tuple[dist.Work, Tensor] | None = None

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGTERM, self._listen)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self._told and any(error):
            # Another process has died, for which torchrun ends the rest, to start all of them again. What is
            # left to do here would only wait for those that are gone.
            signal.raise_signal(signal.SIGTERM)

    def _listen(self, _number: int, _frame: FrameType | None) -> None:
        self._told = True

    def heard(self) -> bool:
        """Whether to end the run now. Every process calls it after every step."""
        if not dist.is_initialized():
            return self._told
        before, told = self._asked, torch.tensor(int(self._told))
        work = dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._asked = work, told
        if before is None:
            return False
        work, told = before
        work.wait()
        return bool(told)
