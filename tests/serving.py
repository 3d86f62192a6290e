"""A process that has imported everything and forks what is asked of it: importing takes longest."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from tests.waiting import Hung, wait_until

ROOT = Path(__file__).parents[1]


class Server:
    """A process that runs a module, which reads requests from its input, one line of JSON each.

    It starts when it is first needed.

    Args:
        module: The module's name.
        environment: The process's environment variables.
    """

    def __init__(self, module, environment):
        self._command, self._environment = [sys.executable, "-m", module], environment
        self._process = None

    def ask(self, request, is_done, moving, what):
        """Send a request, and wait until it is done or the server has ended.

        Args:
            request: Anything that JSON can represent.
            is_done: Returns whether the request is done.
            moving: Returns something that keeps changing unless the request hangs.
            what: What is awaited, for the error message.

        Raises:
            Hung: Nothing has moved for too long; the server has been stopped.
        """
        self._start()
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        try:
            wait_until(lambda: is_done() or self._process.poll() is not None, moving, what)
        except Hung as hung:
            said = self.said()
            self.stop()
            raise Hung(f"{hung}\n{said}") from None

    def printed(self):
        """How much it has printed, in bytes."""
        return os.fstat(self._log.fileno()).st_size

    def said(self):
        """The end of what it has printed."""
        self._log.seek(0)
        return self._log.read()[-5000:]

    def stop(self):
        """Kill it, and every process that it has started."""
        if self._process is not None:
            kill(self._process.pid)
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._log.close()
            self._process = None

    def _start(self):
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        self._log = TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
        )


def kill(pid):
    """Kill a process and all its descendants: workers of torchrun would outlive it."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in children.split():
        kill(int(child))
