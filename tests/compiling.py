"""Kernels compiled for GPUs that are not there."""

import os
import subprocess
import sys


def compile_alone(script, cache, *arguments):
    """Run a script in a process of its own, whose Triton compiles rather than interprets; fail if it fails.

    Args:
        script: Its source.
        cache: A folder for what is compiled: none of it comes from a run before.
        arguments: Those of the script.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
