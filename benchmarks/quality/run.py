"""Train tasks with optimisers, and add a JSON line to a file for each finished run; resumable.

    python benchmarks/quality/run.py --out FILE.jsonl [--tasks NAME ...] [--optimizers NAME ...]
        [--seeds N ...] [--best N] [--size small|large|long] [--device cpu|cuda] [--peers FOLDER]
        [--minutes M]

Runs that the file already has are skipped, so that the same command continues after any interruption. With
`--best 3`, further seeds run only those three settings of each tuned optimiser that were best with the first
seed. Other packages come with `pip install -c constraints.txt ".[quality]"`, or are in a folder of their own,
given by --peers, which may also have the package that shares our import name:

    pip install --target FOLDER --no-deps schedulefree==1.4.1 prodigyopt==1.1.2 dadaptation==3.2 \
        prodigy-plus-schedule-free==2.0.1

ScheduleFree+ is in schedulefree's repository, and not in a release yet; dion has Muon and NorMuon:

    GITHUB=git+https://github.com
    pip install --target FOLDER --no-deps \
        "schedulefree @ $GITHUB/facebookresearch/schedule_free@70785b53e778d0e872c0bbb75ff4ee54ee10c291" \
        "dion @ $GITHUB/microsoft/dion@0a059a4542e5aa74b40dcd1dce363836c7afcd48"

Optimisers that are not installed are reported and left out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is

from quality import peers, results, runs
from quality.peers import OPTIMIZERS, Entry, Setting
from quality.results import Row
from quality.runs import Run
from quality.task import Task
from quality.tasks import TASKS

SIZES = ("small", "large", "long")
WARM_UPS = {"both": (True, False), "with": (True,), "without": (False,)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is left to train."""
    args = parse(arguments)
    if args.peers is not None:
        sys.path.append(str(args.peers))  # after ours
    entries = available([OPTIMIZERS[name] for name in args.optimizers])
    tasks = available_tasks([TASKS[name] for name in args.tasks], args.size)
    done = results.read([args.out])
    until = time.monotonic() + 60 * args.minutes
    planned = plan(args, tasks, entries, done)
    if not runs.finish(args.out, planned, done, folder=args.cache, until=until):
        print("The time is over: the same command goes on from here.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.jsonl")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help=", ".join(TASKS))
    names = list(OPTIMIZERS)
    add("--optimizers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    add("--rates", nargs="+", type=float, metavar="R", help="instead of each tuned optimiser's own")
    add("--warm-up", choices=WARM_UPS, default="both", help="of each rate; default: %(default)s")
    add("--best", type=int, metavar="N", help="settings of the first seed that the further seeds repeat")
    add(
        "--size",
        choices=SIZES,
        default=SIZES[0],
        help="default: %(default)s, seconds to minutes on a CPU core",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--threads", type=int, default=1, help="of the CPU; default: %(default)s")
    add("--minutes", type=float, default=math.inf, help="begin no run after that")
    add("--peers", type=Path, metavar="FOLDER", help="with the packages of others")
    add("--cache", type=Path, default=runs.CACHE, help="for pretrained models; default: %(default)s")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    return args


def available_tasks(tasks: Sequence[Task], size: str) -> list[Task]:
    """The tasks that have this size and whose packages are installed; prints which are left out."""
    found = []
    for task in tasks:
        if size not in task.scales:
            print(f"Left out: {task.name}: it has no size {size!r}", flush=True)
        elif not task.is_available:
            print(f"Left out: {task.name}: {task.needs} is not installed", flush=True)
        else:
            found.append(task)
    return found


def available(entries: Sequence[Entry]) -> list[Entry]:
    """The optimisers that are installed; prints which are not."""
    found = []
    for entry in entries:
        if (why := peers.missing(entry)) is None:
            found.append(entry)
        else:
            print(f"Left out: {entry.name}: {why}", flush=True)
    return found


def plan(
    args: argparse.Namespace, tasks: Sequence[Task], entries: Sequence[Entry], done: dict[str, Row]
) -> Iterator[Run]:
    """All runs in order: a whole round of tasks and optimisers for each seed."""
    for seed, task, entry in itertools.product(args.seeds, tasks, entries):
        settings = entry.settings(args.rates, WARM_UPS[args.warm_up])
        if args.best is not None and seed != args.seeds[0]:

            def loss(setting: Setting, task: Task = task, entry: Entry = entry) -> float:
                row = done.get(Run(task, entry, setting, args.seeds[0], args.size, args.device).key)
                return math.inf if row is None or row["loss"] is None else float(row["loss"])

            settings = sorted(settings, key=loss)[: args.best]
        for setting in settings:
            yield Run(task, entry, setting, seed, args.size, args.device)


if __name__ == "__main__":
    main()
