"""A pool of worker processes that run test functions as the ranks of a gloo process group.

Workers are started once; each case gets a new process group. Every wait has a limit: a case that hangs fails
and prints its workers' stacks, and the next case gets new workers. Progress cannot be seen before a rank
answers, so the limit is generous.
"""

import contextlib
import datetime
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from tests.waiting import HANG

# From a rank's failure until giving up on the others, which may wait for it in a collective; in seconds.
GRACE = 5.0
# For a hanging worker to write its stacks, which on a busy machine may take long; in seconds.
STACKS = 60.0


def _worker(connection, stacks):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Path(stacks).open("w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        connection.send_bytes(b"ready")
        while True:
            try:
                function, args, rank, size, store, limit = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                torch.manual_seed(0)
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=size,
                    timeout=datetime.timedelta(seconds=limit),
                )
                dist.barrier()  # all must be connected before the first may finish and leave
                outcome = True, function(*args)
            except Exception:
                outcome = False, traceback.format_exc()
            finally:
                with contextlib.suppress(Exception):
                    dist.destroy_process_group()
            connection.send_bytes(pickle.dumps(outcome))


class Failed(AssertionError):
    """A rank failed, or did not answer in time; the message has its traceback or stack."""


class Pool:
    def __init__(self):
        # Workers are forked from a server that has imported torch, so they start at once. FSDP imports
        # torch._dynamo at its first use, which takes as long as the rest.
        self._context = multiprocessing.get_context("forkserver")
        imported = ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"]
        self._context.set_forkserver_preload(imported)
        self._folder = tempfile.TemporaryDirectory()
        self._cases = itertools.count()
        self._workers = []

    def run(self, size, function, *args, limit=HANG):
        """Run ``function(*args)`` on ranks 0 to ``size`` - 1; return their results in that order.

        ``limit`` is how many seconds may pass without any rank's answer.
        """
        self._start(size)
        store = f"{self._folder.name}/store.{next(self._cases)}"
        waiting = {}
        for rank, (_, connection, _) in enumerate(self._workers[:size]):
            connection.send_bytes(pickle.dumps((function, args, rank, size, store, limit)))
            waiting[connection] = rank
        results, errors = {}, {}
        end = time.monotonic() + limit
        while waiting and (left := end - time.monotonic()) > 0:
            for connection in wait(list(waiting), timeout=left):
                rank = waiting.pop(connection)
                if not errors:
                    end = time.monotonic() + limit
                try:
                    good, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    good, value = False, "the process died"
                (results if good else errors)[rank] = value
                if not good:
                    end = min(end, time.monotonic() + GRACE)
        if waiting or errors:
            stacks = self._stacks(list(waiting.values()))
            self._kill()
            failed = [f"rank {rank} failed:\n{text}" for rank, text in sorted(errors.items())]
            hung = [f"rank {rank} did not answer:\n{text}" for rank, text in sorted(stacks.items())]
            raise Failed("\n".join(failed + hung))
        return [results[rank] for rank in range(size)]

    def _start(self, size):
        started = len(self._workers)
        while len(self._workers) < size:
            ours, theirs = self._context.Pipe()
            stacks = Path(self._folder.name) / f"stacks.{len(self._workers)}"
            process = self._context.Process(target=_worker, args=(theirs, str(stacks)), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours, stacks))
        for _, connection, _ in self._workers[started:]:
            assert connection.poll(HANG), "a worker does not start"
            connection.recv_bytes()

    def _stacks(self, ranks):
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._workers[rank][0].pid, signal.SIGUSR1)
        files, before = [self._workers[rank][2] for rank in ranks], []
        end = time.monotonic() + STACKS
        while (sizes := [file.stat().st_size for file in files]) != before or not all(sizes):
            if time.monotonic() > end:
                break
            before = sizes
            time.sleep(0.5)
        return {rank: file.read_text() for rank, file in zip(ranks, files, strict=True)}

    def close(self):
        self._kill()
        self._folder.cleanup()

    def _kill(self):
        for process, connection, _ in self._workers:
            connection.close()
            process.kill()
        for process, _, _ in self._workers:
            process.join()
        self._workers.clear()
