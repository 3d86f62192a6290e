"""Makes a process of gpt_fsdp2.py kill itself, once.

A moment is ``step:K:SECONDS``: so long after step K has begun; ``told:K:SECONDS``: the same, but by SIGTERM;
or ``save:K:PLACE``: at a place in the K-th save that the process takes part in.
"""

import os
import signal
import threading
import time

from tests.waiting import HANG

KINDS = {"step": signal.SIGKILL, "told": signal.SIGTERM}


def prepare(rank, moment):
    """Let this process die at a moment, if it has this rank and has not been restarted."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" or os.environ["RANK"] != str(rank):
        return
    kind, number, where = moment.split(":")
    if kind == "save":
        die_in_save(int(number), where)
    else:
        die_at_step(int(number), float(where), by=KINDS[kind])


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
    """Die before a file is written, when half of it is, or when a checkpoint is partly there."""
    import storage

    owner, name = {
        "before": (storage.Writer, "write_data"),
        "half": (storage, "checksum_of"),
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
