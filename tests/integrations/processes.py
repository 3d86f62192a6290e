"""Runs a test in processes of its own that have already imported the frameworks, which takes seconds.

A test that is marked ``@processes(2)`` runs as ranks 0 and 1 of a gloo process group, and not in pytest's own
process. Its arguments are fixtures and parameters that JSON can represent, or paths.
"""

import functools
import os
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.serving import ROOT, Server

FRAMEWORKS = ("transformers", "accelerate", "peft", "trl", "diffusers")
# No GPU, no access to the hub, one thread.
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}


def needs(*names):
    """Skip a test if a framework is not installed, without importing it."""
    missing = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")


class Forking(Server):
    """The process that tests' processes are forked from: see server.py."""

    def __init__(self):
        super().__init__("tests.integrations.server", {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)})

    def run(self, function, size, arguments):
        with TemporaryDirectory() as folder:
            files = [Path(folder) / str(rank) for rank in range(size)]
            asked = {"module": function.__module__, "name": function.__name__, "size": size}
            plain = {k: {"path": str(v)} if isinstance(v, Path) else v for k, v in arguments.items()}
            self.ask(
                asked | {"arguments": plain, "folder": folder},
                lambda: (Path(folder) / "done").exists(),
                self.printed,
                function.__name__,
            )
            failed = {file.name: text for file in files if file.exists() and (text := file.read_text())}
            assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
            assert all(file.exists() for file in files), self.said()


SERVER = Forking()


def processes(size):
    """Run a test as ``size`` ranks; with 1, there is no process group."""

    def decorated(function):
        @functools.wraps(function)
        def test(**arguments):
            SERVER.run(function, size, arguments)

        return test

    return decorated
