"""SIGTERM, which schedulers send before they end a run, and SIGINT, handled between two steps."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist
from report import Report
from torch import Tensor

HANDLED = (signal.SIGTERM, signal.SIGINT)
# A signal to a launcher and its processes reaches these twice, since the launcher forwards it.
DUPLICATE_SECONDS = 1.0


class Interruption:
    """Stops all processes after the same step when any of them receives SIGTERM or SIGINT.

    After every step the processes start an all-reduce of the signals received, and read the result of the one
    before, so that none waits for another. Signals are handled within the ``with`` block, except those that
    were ignored before it.

    A second signal ends the process at once if it or the first is SIGINT: the user does not want to wait.
    (torchrun forwards a second Ctrl-C as SIGTERM. Schedulers repeat SIGTERM, which has no further effect.)

    >>> with Interruption() as interruption:
    ...     for batch in batches:
    ...         take_step(batch)
    ...         if interruption.requested():
    ...             break
    """

    def __init__(self) -> None:
        self.signal = signal.SIGTERM
        """The signal that was received."""
        self._received = 0
        self._received_at = 0.0
        self._pending: tuple[dist.Work, Tensor] | None = None

    @property
    def status(self) -> int:
        """The status of a process that the signal has ended, so that the run does not count as complete."""
        return 128 + self.signal

    def __enter__(self) -> Interruption:
        handled = [signum for signum in HANDLED if signal.getsignal(signum) is not signal.SIG_IGN]
        self._before = {signum: signal.signal(signum, self._handle) for signum in handled}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self._received and any(error):
            # Another process has died, and torchrun ends the rest to restart all of them. Cleaning up here
            # would only wait for processes that no longer exist.
            _terminate(self._received)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._received_at = signum, now
        elif signal.SIGINT in (self._received, signum) and now - self._received_at > DUPLICATE_SECONDS:
            _terminate(signum)

    def requested(self) -> bool:
        """Whether to end the run now. Every process calls it after every step."""
        received = self._reduced() if dist.is_initialized() else self._received
        if received:
            self.signal = signal.Signals(received)
        return bool(received)

    def end(self, report: Report, step: int) -> NoReturn:
        """End the process when the checkpoint is written, outside of the ``with`` block.

        Args:
            report: Where it says so.
            step: The step of the checkpoint.

        Raises:
            SystemExit: Always, with :attr:`status`.
        """
        report.say(f"Ended by {self.signal.name} after {step} steps: --resume goes on from there.")
        raise SystemExit(self.status)

    def _reduced(self) -> int:
        """The signal that any process had received by the step before, or 0."""
        previous, received = self._pending, torch.tensor(self._received)
        work = dist.all_reduce(received, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = work, received
        if previous is None:
            return 0
        work, received = previous
        work.wait()
        return int(received)


def _terminate(signum: int) -> None:
    """End the process as the signal does by default: silently."""
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)
