"""Compiling kernels for GPUs that this machine does not have."""

import os
import subprocess
import sys


def compile_alone(script, cache, *arguments):
    """Run a script in a process of its own, in which Triton compiles instead of interpreting.

    Fails if the script does.

    Args:
        script: Its source.
        cache: A new folder for compiled kernels, so that none comes from an earlier run.
        arguments: The script's arguments.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
