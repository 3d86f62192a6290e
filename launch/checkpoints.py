"""Checkpoints of a run, written in the background; a run on any mesh of processes can resume from them."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import files
import storage
import torch
import torch.distributed as dist
from options import positive, seconds
from ranks import Ranks
from report import Record
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import check_replicas

FOLDER = "checkpoints"  # in --out
RUN = "run.json"


def job() -> str | None:
    """The id of the torchrun job, the same after a restart; None without torchrun or without an id."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name  # torchrun's default for a job without an id


@dataclass(frozen=True, slots=True)
class Run:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    job: str | None = field(default_factory=job)
    minutes: float = 0.0


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step in a folder of checkpoints."""
    return next(reversed(_all_in(folder)), None)


def _all_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder by ascending step: all that have the name of one, damaged or not."""
    found = (path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def _restarted() -> bool:
    """Whether torchrun has restarted the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def add_arguments(parser: argparse.ArgumentParser, when: str) -> None:
    """Add the options for writing checkpoints and resuming from them.

    Args:
        parser: The parser of the script.
        when: When checkpoints are written even without ``--save-every``, for its help text.
    """
    add = parser.add_argument
    add("--save-every", type=positive, metavar="STEPS", help=f"checkpoints; {when}")
    add("--keep", type=positive, default=3, metavar="N", help="of them, the last; default: %(default)s")
    resume_help = "go on from a checkpoint; default: the newest in --out, or the beginning if there is none"
    add("--resume", type=Path, nargs="?", const=True, metavar="PATH", help=resume_help)
    timeout_help = "give up on a process that is silent for so long; default: 600"
    add("--timeout", type=seconds, default=seconds("600"), metavar="SECONDS", help=timeout_help)


def find(args: argparse.Namespace, settings: Mapping[str, Any]) -> tuple[Path | None, Run]:
    """The checkpoint to resume from, if any, and the run until then.

    It is the one that ``--resume`` names, or the newest in ``--out`` if this job has written it: then a
    process has failed since, and torchrun has restarted all of them. (The first start of a job refuses an
    ``--out`` with checkpoints of another one.)

    Args:
        args: The options of the command line.
        settings: The settings that the run must share with that of the checkpoint.

    Raises:
        OSError: The checkpoint does not exist or is damaged.
        ValueError: It belongs to another run, or ``--out`` has a newer one than ``--resume`` names.
    """
    folder, resume = args.out / FOLDER, args.resume
    last = newest(folder)
    if last is not None:
        writer = _read_newest(last).job
        if _restarted() or (job() is not None and writer == job()):
            resume = True
    if last is not None and resume is None:
        raise ValueError(
            f"{last} is of an earlier run: go on from it with --resume, or choose another --out."
        )
    path = last if resume is True else resume
    if path is None:
        return None, Run()
    if not path.is_dir():
        raise FileNotFoundError(f"--resume: there is no checkpoint {path}; leave --resume out to start anew.")
    if last is not None and path.resolve() != last.resolve():
        raise ValueError(
            f"--resume: {path} is not {last}, which would be the one to go on from hereafter: choose another "
            "--out."
        )
    run = _read(path)
    for name, value in settings.items():
        if name not in run.settings:
            raise ValueError(f"{path} is not a checkpoint of this script.")
        if run.settings[name] != value:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--resume: {path} was trained with {option} {run.settings[name]}, not {value}.")
    return path, run


def _read_newest(path: Path) -> Run:
    try:
        return _read(path)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{str(error).removesuffix('.')}: remove {path} to go on from what was saved before it, if "
            "anything was."
        ) from error


def _read(path: Path) -> Run:
    storage.check_file(path, RUN)
    try:
        return Run(**json.loads((path / RUN).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this script.") from error


class Checkpoints:
    """Writes the checkpoints of a run to ``OUT/checkpoints/STEP``, one at a time, while training continues.

    A checkpoint appears whole or not at all, and the last few are kept. ``OUT`` is locked for as long as the
    process lives: no other run can write to it.

    Args:
        args: The options of the command line.
        ranks: The processes of the run.
    """

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self._folder = args.out / FOLDER
        self._keep = args.keep
        self._ranks = ranks
        self._pending: tuple[ThreadPoolExecutor, Future[Any]] | None = None
        # A group of its own, so that background collectives do not interleave with those of training.
        self._group = dist.new_group(backend="gloo", timeout=args.timeout) if ranks.size > 1 else None
        _ignore_no_process_group()
        writer = [secrets.token_hex(4)]
        if self._group is not None:
            dist.broadcast_object_list(writer, group=self._group)
        (self._writer,) = writer
        with ranks.fail_together():
            if ranks.rank == 0:
                # A file server releases the lock of a dead host only after a minute or two.
                patience = args.timeout / 2 if _restarted() else timedelta()
                files.lock(args.out, patience)
                storage.clean(self._folder)

    def begin(self, run: Run, model: nn.Module, optimizer: Optimizer) -> None:
        """Start writing a checkpoint of the model and the optimiser as they are now.

        A copy of both stays in host memory until it is written.

        Raises:
            OSError: The previous checkpoint could not be written.
            RuntimeError: Replicas differ between processes. They are not saved: a restart resumes from an
                earlier checkpoint.
        """
        self.finish()
        if isinstance(optimizer, ProdigyPlusScheduleFree):
            check_replicas(optimizer)
        path = self._folder / f"{run.step:08}"
        texts = {}
        if self._ranks.rank == 0:
            values = {f.name: getattr(run, f.name) for f in fields(run)}
            texts = {RUN: json.dumps(values, default=str)}
        thread = ThreadPoolExecutor(1)
        future = thread.submit(
            dcp_save,
            _map_tensors(_state(model, optimizer), lambda tensor: tensor.detach().to("cpu", copy=True)),
            storage_writer=storage.Writer(path, texts, self._writer),
            process_group=self._group,
        )
        self._pending = thread, future

    def finish(self) -> None:
        """Wait until the pending checkpoint is written, and remove those beyond ``--keep``.

        Raises:
            OSError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        thread, future = pending
        # The thread is joined: as long as it lives, it can hold the process group, and so gloo's own threads.
        with _plain_errors(f"a checkpoint cannot be written to {self._folder}"), thread:
            future.result()
        if self._ranks.rank == 0:
            for path in _all_in(self._folder)[: -self._keep]:
                _remove(path)


def resume(
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    ranks: Ranks,
) -> tuple[Checkpoints, Run]:
    """Load the checkpoint that :func:`find` chooses, if any, and lock ``--out`` for those to come.

    All processes call it together, before anything is written to ``--out``. It ends all of them where the
    run cannot go on from the checkpoint, or they do not have the same settings and checkpoints.

    Args:
        args: The options of the command line.
        settings: The settings that the run must share with that of the checkpoint.
        model: The model, as it is at the beginning of a run.
        optimizer: Its optimiser.
        ranks: The processes of the run.

    Returns:
        What writes the checkpoints to come, and the run until now.
    """
    with ranks.fail_together():
        find(args, settings)  # report errors before --out is created
    written = Checkpoints(args, ranks)
    with ranks.fail_together():
        path, before = find(args, settings)  # again, now that no other run can write to --out
    with ranks.fail_together():
        if not ranks.agree((settings, before.step)):
            raise ValueError(
                "the nodes differ in their options, data or checkpoints: start all of them by the same "
                "command, and share --out and --data among them."
            )
        if path is not None:
            load(path, model, optimizer, ranks)
    if path is not None and ranks.rank == 0:
        print(f"Going on from {path}", flush=True)
    return written, before


def load(path: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
    """Load a checkpoint into the model and the optimiser, whatever mesh it was saved on.

    Both are unchanged until all of it has been read and verified. This takes their memory a second time, when
    there are no gradients or activations yet.

    Raises:
        OSError: The checkpoint has other tensors, or cannot be read.
        SystemExit: It is damaged.
    """
    with ranks.fail_together():
        storage.check(path, ranks.rank, ranks.size)
    _ignore_no_process_group()
    state = _map_tensors(_state(model, optimizer), torch.empty_like)
    with _plain_errors(f"{path} cannot be read"):
        storage.load(state, path)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    set_model_state_dict(model, state["model"])


def _remove(path: Path) -> None:
    try:
        storage.remove(path)
    except OSError as error:  # an old checkpoint that stays is no reason to end the run
        warnings.warn(f"{path} cannot be removed: {error}", stacklevel=3)


def _ignore_no_process_group() -> None:
    """Silence, in every thread, torch's warning that a single process has no process group."""
    if not dist.is_initialized():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def _map_tensors(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a state dict with ``function`` applied to every tensor."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: _map_tensors(value, function) for key, value in state.items()}
    return [_map_tensors(value, function) for value in state] if isinstance(state, list) else state


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Raise the failures of all processes, which each of them sees, as one line."""
    try:
        yield
    except CheckpointException as error:
        reasons = {f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}
        raise OSError(f"{what}: {'; '.join(sorted(reasons))}") from error
