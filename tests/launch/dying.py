"""Runs of gpt_fsdp2.py of which one process kills itself, once, and which torchrun starts again.

    python -m tests.launch.dying CASES OUT [--option …]

CASES is a JSON object: of every run its name, and ``[RANK, MOMENT]``, or null where nobody dies. MOMENT is
``step:K:SECONDS``, so long after step K has begun; ``told:K:SECONDS``, the same by SIGTERM; or
``save:K:PLACE``, a place in the K-th save that the process has a part in. The options, and ``OUT/NAME`` for
each run, go to gpt_fsdp2.py, which is to be found in PYTHONPATH.

The launcher is torchrun's own, and so is all that follows a death. But the processes are forked from one that
has imported everything, which takes most of the time otherwise.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

from tests.waiting import HANG

PROCESSES = 4
KINDS = {"step": signal.SIGKILL, "told": signal.SIGTERM}


def worker(name, rank, moment, options):
    import gpt_fsdp2

    starts = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
    if starts == 1 and os.environ["RANK"] == str(rank):
        kind, number, where = moment.split(":")
        if kind == "save":
            die_in_save(int(number), where)
        else:
            die_at_step(int(number), float(where), by=KINDS[kind])
    sys.argv = ["gpt_fsdp2.py", *options]
    gpt_fsdp2.main()
    if os.environ["RANK"] == "0":
        sys.stdout.write(f"{name}: began {starts} times\n")


def die(by=signal.SIGKILL):
    os.kill(os.getpid(), by)


def die_at_step(number, delay, by):
    import gpt_fsdp2

    def counted(*args):
        taken.append(None)
        if len(taken) == number:
            threading.Timer(delay, die, [by]).start()
        return take_step(*args)

    taken, take_step = [], gpt_fsdp2.take_step
    gpt_fsdp2.take_step = counted


def die_in_save(number, place):
    """Before a file is written, when half of it is, or when some of what makes a checkpoint is there."""
    import storage

    owner, name = {
        "before": (storage.Writer, "write_data"),
        "half": (storage, "sum_of"),
        "written": (storage.Writer, "finish"),
        "named": (storage, "_write"),
        "renamed": (storage, "_sync"),
    }[place]

    def counted(*args, **options):
        calls.append(None)
        if len(calls) == number:
            if place == "half":
                os.truncate(args[0], args[0].stat().st_size // 2)
            die()
            time.sleep(HANG)
        return function(*args, **options)

    calls, function = [], getattr(owner, name)
    setattr(owner, name, counted)


def main():
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cases, out, options = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    multiprocessing.set_forkserver_preload(["gpt_fsdp2"])
    for name, case in cases.items():
        rank, moment = case or (None, None)
        config = LaunchConfig(
            1,
            1,
            PROCESSES,
            run_id=name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=3,
            start_method="forkserver",
            metrics_cfg={},
        )
        begun = time.monotonic()
        elastic_launch(config, worker)(name, rank, moment, [*options, "--out", str(out / name)])
        sys.stdout.write(f"{name}: {case}, {time.monotonic() - begun:.1f} s\n")


if __name__ == "__main__":
    main()
