"""Runs tests in processes that are forked from one that has imported the frameworks: see processes.py.

Each line of its input asks for a test: ``{"module", "name", "size", "arguments", "folder"}``. Each rank
writes ``FOLDER/RANK``: empty if the test has passed, otherwise its traceback. Last comes ``FOLDER/done``.
"""

import contextlib
import datetime
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp

from tests.integrations.processes import FRAMEWORKS
from tests.waiting import HANG

# From a rank's first failure until giving up on the others, in seconds.
GRACE = 5.0
IMPORTED = {
    "transformers": ("transformers.trainer", "transformers.models.llama.modeling_llama"),
    "accelerate": ("accelerate",),
    "peft": ("peft",),
    "trl": ("trl.trainer.sft_trainer",),
    "diffusers": ("diffusers.models.unets.unet_2d", "diffusers.training_utils"),
}


def be_rank(rank, module, name, size, arguments, folder):
    """Run a test as one of ``size`` ranks, and write its outcome; return whether it has failed."""
    faulthandler.dump_traceback_later(HANG, exit=True)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    said = ""
    try:
        if size > 1:
            os.environ.update({key: str(value) for key, value in environment.items()})
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29501")  # some frameworks read these
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=HANG),
            )
        torch.manual_seed(0)
        # Warnings are errors, except those that arise within the frameworks.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=rf"({'|'.join((*FRAMEWORKS, 'torch', 'datasets'))})\b")
        getattr(importlib.import_module(module), name).__wrapped__(**arguments)
        if size > 1:
            dist.barrier()
    except BaseException:
        said = traceback.format_exc()
    (Path(folder) / f"{rank}.part").write_text(said)
    (Path(folder) / f"{rank}.part").rename(Path(folder) / str(rank))
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    return bool(said)


def main():
    torch.set_num_threads(1)
    for names in IMPORTED.values():
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        for key, value in asked["arguments"].items():
            if isinstance(value, dict):
                asked["arguments"][key] = Path(value["path"])
        children = set()
        for rank in range(asked["size"]):
            if (child := os.fork()) == 0:
                failed = be_rank(rank, **asked)
                sys.stdout.flush()
                os._exit(failed)
            children.add(child)
        wait_for(children)
        folder = Path(asked["folder"])
        for rank in range(asked["size"]):
            if not (folder / str(rank)).exists():
                (folder / str(rank)).write_text("the process died, or was ended since another one failed")
        (folder / "done").touch()


def wait_for(children):
    """Wait for ranks to end; after a failure, kill the rest, which may be waiting for it."""
    end = None
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        children.discard(child)
        if child and status and end is None:
            end = time.monotonic() + GRACE
        if end is not None and time.monotonic() > end:
            for left in children:
                os.kill(left, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
