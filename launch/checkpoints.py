"""Checkpoints of a run, written while it goes on: folders that any mesh of processes can go on from."""

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
    """The name of the job that torchrun starts processes for, again when some have failed; None without."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name  # what torchrun calls a job that was given no name


@dataclass(frozen=True, slots=True)
class Run:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    job: str | None = None
    minutes: float = 0.0


def newest(folder: Path) -> Path | None:
    """The checkpoint of the most steps in a folder of checkpoints."""
    return next(reversed(_all_in(folder)), None)


def _all_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order of their steps: whatever is named as one, be it damaged."""
    found = (path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def _started_again() -> bool:
    """Whether torchrun has started the processes before, and some have failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def add_arguments(parser: argparse.ArgumentParser, when: str) -> None:
    """Add what says when checkpoints are written, and which to go on from.

    Args:
        parser: The script's.
        when: When they are written without ``--save-every``.
    """
    add = parser.add_argument
    add("--save-every", type=positive, metavar="STEPS", help=f"checkpoints; {when}")
    add("--keep", type=positive, default=3, metavar="N", help="of them, the last; default: %(default)s")
    resume_help = "go on from a checkpoint; default: the newest in --out, or the beginning if there is none"
    add("--resume", type=Path, nargs="?", const=True, metavar="PATH", help=resume_help)
    timeout_help = "give up on a process that is silent for so long; default: 600"
    add("--timeout", type=seconds, default=seconds("600"), metavar="SECONDS", help=timeout_help)


def find(args: argparse.Namespace, settings: Mapping[str, Any]) -> tuple[Path | None, Run]:
    """The checkpoint to go on from, if any, and what was before it.

    That is what ``--resume`` says, or the newest of ``--out`` if this very job has written it: then one of
    its processes has failed since, and all have been started again. (What another has written, the first
    start of a job has refused.)

    Args:
        args: The options of the command line.
        settings: What the run must have in common with that of the checkpoint.

    Raises:
        OSError: There is no such checkpoint, or it is damaged.
        ValueError: It is of another run; or ``--out`` has some, but ``--resume`` does not name the newest.
    """
    folder, resume = args.out / FOLDER, args.resume
    last = newest(folder)
    if last is not None:
        theirs = _read_newest(last).job
        if _started_again() or (job() is not None and theirs == job()):
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
    for name, ours in settings.items():
        if name not in run.settings:
            raise ValueError(f"{path} is not a checkpoint of this script.")
        if run.settings[name] != ours:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--resume: {path} was trained with {option} {run.settings[name]}, not {ours}.")
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
    """Those that a run writes to ``OUT/checkpoints/STEP``, one after the other, while it goes on.

    Each is whole or not there, and the last few are kept. From the first of these objects on, no other
    process can have one for the same ``OUT``.

    Args:
        args: The options of the command line.
        ranks: The processes of the run.
    """

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self._folder = args.out / FOLDER
        self._keep = args.keep
        self._ranks = ranks
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[Any] | None = None
        # What goes on beside the training must not come between its messages.
        self._group = dist.new_group(backend="gloo", timeout=args.timeout) if ranks.size > 1 else None
        _expect_to_be_alone()
        writer = [secrets.token_hex(4)]
        if self._group is not None:
            dist.broadcast_object_list(writer, group=self._group)
        (self._writer,) = writer
        with ranks.together():
            if ranks.rank == 0:
                # What a dead host had locked, a file server lets go of a minute or two later.
                patience = args.timeout / 2 if _started_again() else timedelta()
                files.lock(args.out, patience)
                storage.clean(self._folder)

    def begin(self, run: Run, model: nn.Module, optimizer: Optimizer) -> None:
        """Begin to write a checkpoint of the model and the optimiser as they are now.

        It holds a copy of them in the memory of the host until it is written.

        Raises:
            OSError: The one before could not be written.
            RuntimeError: Processes differ where they hold copies: started again, they go on from a checkpoint
                that was written before.
        """
        self.finish()
        if isinstance(optimizer, ProdigyPlusScheduleFree):
            check_replicas(optimizer)
        path = self._folder / f"{run.step:08}"
        texts = {}
        if self._ranks.rank == 0:
            values = {its.name: getattr(run, its.name) for its in fields(run)}
            texts = {RUN: json.dumps(values, default=str)}
        self._pending = self._thread.submit(
            dcp_save,
            _mapped(_state(model, optimizer), lambda tensor: tensor.detach().to("cpu", copy=True)),
            storage_writer=storage.Writer(path, texts, self._writer),
            process_group=self._group,
        )

    def finish(self) -> None:
        """Wait until the last checkpoint that was begun is there, and remove those that are too many.

        Raises:
            OSError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with _plain_errors(f"a checkpoint cannot be written to {self._folder}"):
            pending.result()
        if self._ranks.rank == 0:
            for path in _all_in(self._folder)[: -self._keep]:
                _remove(path)


def load(path: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
    """Take over the model and the optimiser, whatever mesh they were saved from.

    Until all of it has been read and found whole, they stay as they were. That takes their memory once more,
    when there are neither gradients nor activations yet.

    Raises:
        OSError: The checkpoint is damaged, or of other tensors; in all processes, if in one.
    """
    with ranks.together():
        storage.check(path, ranks.rank, ranks.size)
    _expect_to_be_alone()
    state = _mapped(_state(model, optimizer), torch.empty_like)
    with _plain_errors(f"{path} cannot be read"):
        storage.load(state, path)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    set_model_state_dict(model, state["model"])


def _remove(path: Path) -> None:
    try:
        storage.remove(path)
    except OSError as error:  # one too many is no reason to end
        warnings.warn(f"{path} cannot be removed: {error}", stacklevel=3)


def _expect_to_be_alone() -> None:
    """Where there is one process, it needs no warning that it is the only one; nor does its other thread."""
    if not dist.is_initialized():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def _mapped(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A state with what a function makes of its tensors."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: _mapped(value, function) for key, value in state.items()}
    return [_mapped(value, function) for value in state] if isinstance(state, list) else state


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Tell of the failures of any process in one line; every process sees them all."""
    try:
        yield
    except CheckpointException as error:
        reasons = {f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}
        raise OSError(f"{what}: {'; '.join(sorted(reasons))}") from error
