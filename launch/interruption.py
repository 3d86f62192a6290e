"""SIGTERM, by which schedulers announce that they will end a run, and SIGINT: heard between two steps."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

HEARD = (signal.SIGTERM, signal.SIGINT)
# Seconds. Who tells a launcher and its processes tells these twice, since it passes on what it is told.
REPEATED = 1.0


class Interruption:
    """SIGTERM or SIGINT, sent to any process of the run, heard by all of them after the same step.

    The processes ask each other after every step, and read the answers to what they asked a step before: so
    none waits for another. Signals are listened to within a ``with`` block, but for those that are ignored.

    Who sends another signal after SIGINT, or SIGINT after another, does not want to wait: it ends the process
    at once. (torchrun passes on a second Ctrl-C as SIGTERM. Schedulers repeat theirs, and it stays one.)

    >>> with Interruption() as interruption:
    ...     for batch in batches:
    ...         take_step(batch)
    ...         if interruption.heard():
    ...             break
    """

    def __init__(self) -> None:
        self.signal = signal.SIGTERM
        """Which signal was heard."""
        self._told = 0
        self._since = 0.0
        self._asked: tuple[dist.Work, Tensor] | None = None

    @property
    def status(self) -> int:
        """What shells call a process that the signal has ended: the run is seen not to be at its end."""
        return 128 + self.signal

    def __enter__(self) -> Interruption:
        ours = [number for number in HEARD if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._listen) for number in ours}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._told and any(error):
            # Another process has died, for which torchrun ends the rest, to start all of them again. What is
            # left to do here would only wait for those that are gone.
            _end_by(self._told)

    def _listen(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._told:
            self._told, self._since = number, now
        elif signal.SIGINT in (self._told, number) and now - self._since > REPEATED:
            _end_by(number)

    def heard(self) -> bool:
        """Whether to end the run now. Every process calls it after every step."""
        told = self._answers() if dist.is_initialized() else self._told
        if told:
            self.signal = signal.Signals(told)
        return bool(told)

    def _answers(self) -> int:
        """What any process had been told a step before."""
        before, told = self._asked, torch.tensor(self._told)
        work = dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._asked = work, told
        if before is None:
            return 0
        work, told = before
        work.wait()
        return int(told)


def _end_by(number: int) -> None:
    """End the process as a signal does that nobody listens to: without a word."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
