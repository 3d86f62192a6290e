"""A long-lived launcher that starts one run of the scripts after another. See ``running.launch()``.

    python -m tests.launch.launcher

Each line of its input is a run: a JSON object with the arguments of :func:`run`. Runs of several processes
are started by torchrun's own code, which also handles a death. But the processes are forked from one that
has imported everything, since importing would take most of the time.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

from tests.launch import dying


def worker(script, options, folder, death):
    """Be one process of a run, and print into files."""
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        with (Path(folder) / name).open("a") as file:
            os.dup2(file.fileno(), stream.fileno())
    if death is not None:
        dying.prepare(*death)
    sys.argv = [script, *options]
    try:
        importlib.import_module(script.removesuffix(".py")).main()
        if not script.startswith("examples."):  # examples do without torch's private names
            threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
            # A thread of gloo that is left can abort the process while Python ends.
            assert not any("gloo" in name for name in threads), threads
    except Exception:
        traceback.print_exc()  # as for a script
        raise
    if os.environ.get("RANK", "0") == "0":
        starts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + 1
        (Path(folder) / "starts").write_text(str(starts))


def run(number, script, processes, options, folder, death=None, restarts=0):
    """Run a script to its end.

    Args:
        number: The run's number.
        script: The script's name.
        processes: How many; 0: one process without torchrun.
        options: The script's command-line options.
        folder: Where its output goes.
        death: ``[RANK, MOMENT]`` of a process that kills itself, once: see dying.py.
        restarts: How often torchrun may restart the processes.

    Returns:
        The exit status that a shell would see.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    arguments = script, options, folder, death
    if not processes:
        process = multiprocessing.get_context("forkserver").Process(target=worker, args=arguments)
        process.start()
        process.join()
        return process.exitcode
    config = LaunchConfig(
        1,
        1,
        processes,
        run_id=f"{os.getpid()}.{number}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="forkserver",
        metrics_cfg={},
    )
    try:
        elastic_launch(config, worker)(*arguments)
    except ChildFailedError as error:
        with (Path(folder) / "stderr").open("a") as file:
            file.write(f"{error}\n")  # a process that a signal has killed prints nothing itself
        return 1
    return 0


def main():
    multiprocessing.set_forkserver_preload(["tests.launch.imported"])
    for number, line in zip(itertools.count(), sys.stdin, strict=False):
        arguments = json.loads(line)
        status = run(number, **arguments)
        (Path(arguments["folder"]) / "status").write_text(f"{status}\n")


if __name__ == "__main__":
    main()
