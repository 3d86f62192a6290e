"""Processes: a worker that calls methods on request, ranks of a process group, and scripts of ``launch/``.

A script that starts some has to be importable: they are forked from a server that has imported torch, and
then import the script.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from harness import ROOT

GRACE = 5.0  # seconds from the first failure of a rank until the others are ended
LONGEST = 200  # characters of an error
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor"]  # none that may differ between folders


class WorkerError(Exception):
    """Why a process did not answer.

    Args:
        said: The error in a line.
        kind: What happened.
        stated_in: The file with the ``raise`` or ``assert``, if the error came from one.
        when: The monotonic time of the failure.
    """

    def __init__(
        self,
        said: str,
        kind: Literal["raised", "missing", "died", "late"],
        stated_in: str = "",
        when: float = math.inf,
    ) -> None:
        super().__init__(said, kind, stated_in, when)
        self.said, self.kind, self.stated_in, self.when = said, kind, stated_in, when

    def __str__(self) -> str:
        return self.said

    @classmethod
    def of(cls, error: Exception) -> WorkerError:
        """The description of an exception."""
        kind: Literal["missing", "raised"] = "missing" if isinstance(error, ImportError) else "raised"
        last = traceback.extract_tb(error.__traceback__)[-1]
        stated_in = last.filename if re.match(r"(raise|assert)\b", last.line or "") else ""
        return cls(f"{type(error).__name__}: {first_line(str(error))}", kind, stated_in, time.monotonic())


def first_line(text: str) -> str:
    """The first line of a message, without the place in C++ that it may begin with."""
    line = re.sub(r"^\[[^]]*\] *", "", (text.strip() or "(no message)").splitlines()[0])
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


class Worker:
    """A process with an object whose methods it calls, seen from outside.

    Args:
        make: Makes the object there.
        args: The arguments of ``make``.
        path: Folders to import from before all others.
        said: The file for what the process prints; None: it prints as usual.
    """

    def __init__(
        self, make: Callable[..., object], *args: Any, path: Sequence[Path] = (), said: Path | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.connection, there = context.Pipe()
        self._said = said
        self._process = context.Process(
            target=_serve, args=(there, said, list(map(str, path)), make, args), daemon=True
        )
        self._process.start()
        there.close()

    def tell(self, method: str, *args: Any) -> None:
        """Call a method, without waiting for the answer."""
        with suppress(OSError):  # a process that failed before this call has reported why
            self.connection.send((method, args))

    def answer(self, limit: float) -> Any:
        """The answer, within ``limit`` seconds.

        Raises:
            WorkerError: It failed, or has not answered in time.
        """
        if not self.connection.poll(limit):
            raise WorkerError(f"no answer within {limit:.0f} s", "late")
        try:
            good, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise WorkerError(
                f"the process died: {self._last_words()}", "died", "", time.monotonic()
            ) from None
        if not good:
            raise value
        return value

    def ask(self, limit: float, method: str, *args: Any) -> Any:
        """Call a method, and wait for the answer."""
        self.tell(method, *args)
        return self.answer(limit)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _last_words(self) -> str:
        """The C++ exception that ended the process, as it wrote it, or how it ended."""
        written = self._said.read_text(errors="replace") if self._said and self._said.exists() else ""
        _, found, what = written.rpartition("what():")
        self._process.join(1)
        return first_line(what) if found else f"exit code {self._process.exitcode}"


def _serve(
    connection: Connection, said: Path | None, path: list[str], make: Callable[..., object], args: Any
) -> None:
    if said is not None:
        written = os.open(said, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(written, stream)
    sys.path[:0] = path
    try:
        made = make(*args)
        while True:
            method, given = connection.recv()
            connection.send((True, getattr(made, method)(*given)))
    except EOFError:
        return  # the parent has ended
    except Exception as error:
        traceback.print_exc()
        connection.send((False, WorkerError.of(error)))
        connection.poll(None)  # a process that ends early breaks transfers of others


class Rank:
    """A rank of a process group over gloo, with one thread; on request with cores of its own, for gloo too.

    Without these, a message that wakes a process may move it to the core of the sender, and leave it there.
    """

    def __init__(self, rank: int, size: int, folder: Path, silence: float, pinned: bool) -> None:
        if pinned and sys.platform == "linux":
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores[rank::size] or {cores[rank % len(cores)]})
        torch.set_num_threads(1)
        store, timeout = f"file://{folder}/store", timedelta(seconds=silence)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a function."""
        return function(*args)


def on_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    limit: float,
    path: Sequence[Path] = (),
    pinned: bool = False,
    verbose: bool = True,
) -> list[Any]:
    """The results of a function on every rank of a process group, within ``limit`` seconds.

    Unless ``verbose``, what the processes print goes into files, from which errors are quoted.

    Raises:
        WorkerError: The first failure of a rank.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = []
        for rank in range(size):
            said = None if verbose else Path(folder, f"{rank}.txt")
            workers.append(Worker(Rank, rank, size, Path(folder), limit, pinned, path=path, said=said))
            stack.callback(workers[-1].close)
            workers[-1].tell("run", function, *args)
        results: dict[int, Any] = {}
        failures: list[WorkerError] = []
        waiting: dict[Any, int] = {worker.connection: rank for rank, worker in enumerate(workers)}
        until = time.monotonic() + limit
        while waiting and (left := until - time.monotonic()) > 0:
            for end in wait(list(waiting), timeout=left):
                rank = waiting.pop(end)
                try:
                    results[rank] = workers[rank].answer(0)
                except WorkerError as failure:
                    failures.append(failure)
                    until = min(until, time.monotonic() + GRACE)
    if failures:  # the first; but a lost connection is the fault of the rank at its other end
        raise min(failures, key=lambda failure: ("Connection" in failure.said, failure.when))
    if waiting:
        raise WorkerError(f"{len(waiting)} of {size} ranks had not ended in {limit:.0f} s", "late")
    return [results[rank] for rank in range(size)]


@contextmanager
def simulated(ranks: int, rank: int = 0) -> Iterator[None]:
    """A process group in which this process is one rank, and the others do not exist: torch's fake one."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # Otherwise this group's meshes would replace equal ones of the next.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]


def log_of(script: str, ranks: int, *options: str, within: str = "") -> list[dict[str, Any]]:
    """The log of a script of ``launch/`` under torchrun; a program may run instead, and start the script."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        launcher += ["--no-python", sys.executable, "-c", within] if within else []
        command = [sys.executable, *launcher, f"launch/{script}", "--out", folder, *options]
        # torchrun does so for several processes, but not for one, whose sums would use several threads.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
        return list(map(json.loads, Path(folder, "log.jsonl").read_text().splitlines()))
