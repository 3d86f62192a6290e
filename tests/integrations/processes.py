"""Run a test in processes of its own, that have imported the frameworks: importing them takes seconds.

A test that is marked ``@processes(2)`` runs as ranks 0 and 1 of a gloo process group; in pytest's process
nothing of it runs. Its arguments are fixtures and parameters that JSON can say, or paths.
"""

import functools
import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import pytest

from tests.waiting import Hung, wait_until

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("transformers", "accelerate", "peft", "trl", "diffusers")
# No GPU, no hub, one thread.
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}


def needs(*names):
    """Skip a test where a framework is not installed, without importing it."""
    missing = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")


class Server:
    """The process that they are forked from, which starts when it is first needed."""

    def __init__(self):
        self._process = None

    def run(self, function, size, arguments):
        with TemporaryDirectory() as folder:
            files = [Path(folder) / str(rank) for rank in range(size)]
            asked = {"module": function.__module__, "name": function.__name__, "size": size}
            plain = {k: {"path": str(v)} if isinstance(v, Path) else v for k, v in arguments.items()}
            self._start()
            self._process.stdin.write(json.dumps(asked | {"arguments": plain, "folder": folder}) + "\n")
            self._process.stdin.flush()

            def over():
                return (Path(folder) / "done").exists() or self._process.poll() is not None

            try:
                wait_until(over, lambda: self._log.tell(), function.__name__)
            except Hung as hung:
                self.stop()
                raise Hung(f"{hung}\n{self._said()}") from None
            failed = {file.name: text for file in files if file.exists() and (text := file.read_text())}
            assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
            assert all(file.exists() for file in files), self._said()

    def _start(self):
        if self._process is None or self._process.poll() is not None:
            self._log = TemporaryFile("w+")  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.integrations.server"],
                cwd=ROOT,
                env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                text=True,
            )

    def _said(self):
        self._log.seek(0)
        return self._log.read()[-5000:]

    def stop(self):
        if self._process is not None:
            process, self._process = self._process, None
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.kill()
            process.wait()


SERVER = Server()


def processes(size):
    """Run a test as ``size`` ranks; one of 1 has no process group."""

    def decorated(function):
        @functools.wraps(function)
        def test(**arguments):
            SERVER.run(function, size, arguments)

        return test

    return decorated
