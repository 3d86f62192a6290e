"""A launcher that is there already: it starts one run of the scripts after the other. See running.launch().

    python -m tests.launch.launcher

Each line of its input is a run: a JSON object of the arguments of :func:`run`. Where a run is of several
processes, what starts them, and all that follows a death, is torchrun's own. But processes are forked from
one that has imported everything, which takes most of the time otherwise.
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
    """One process of a run, which prints into files."""
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        with (Path(folder) / name).open("a") as file:
            os.dup2(file.fileno(), stream.fileno())
    if death is not None:
        dying.prepare(*death)
    sys.argv = [script, *options]
    try:
        importlib.import_module(script.removesuffix(".py")).main()
        if not script.startswith("examples."):  # which have no use for torch's private names
            threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
            # One can abort the process as Python ends.
            assert not any("gloo" in name for name in threads), threads
    except Exception:
        traceback.print_exc()  # as a script does
        raise
    if os.environ.get("RANK", "0") == "0":
        starts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + 1
        (Path(folder) / "starts").write_text(str(starts))


def run(number, script, processes, options, folder, death=None, restarts=0):
    """Run a script to its end.

    Args:
        number: Of this run.
        script: Its name.
        processes: How many; none: one without torchrun.
        options: Those of its command line.
        folder: Where what it prints goes.
        death: ``[RANK, MOMENT]`` of a process that kills itself, once: see dying.py.
        restarts: How often torchrun may start the processes again.

    Returns:
        What a shell would call the status of its command.
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
            file.write(f"{error}\n")  # a process that a signal has ended says nothing itself
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
