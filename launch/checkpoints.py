"""Checkpoints of a sharded run: folders that every process writes its pieces to, and any mesh can read."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ranks import Ranks
from report import Record
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

RUN = "run.json"


@dataclass(frozen=True, slots=True)
class Run:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


def newest(folder: Path) -> Path | None:
    """The checkpoint of the most steps in a folder of checkpoints."""
    return max((path.parent for path in folder.glob(f"[0-9]*/{RUN}")), default=None)


def read_run(path: Path, settings: Mapping[str, Any]) -> Run:
    """What the checkpoint tells of its run.

    Raises:
        OSError: There is no checkpoint.
        ValueError: It is no checkpoint, or one of a run with other settings.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"--resume: there is no checkpoint {path}; leave --resume out to start anew.")
    try:
        run = Run(**json.loads((path / RUN).read_text()))
        theirs = {name: run.settings[name] for name in settings}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--resume: {path} is not a checkpoint of this script.") from error
    for name, ours in settings.items():
        if theirs[name] != ours:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--resume: {path} was trained with {option} {theirs[name]}, not {ours}.")
    return run


def save(folder: Path, run: Run, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
    """Write the checkpoint ``folder/STEP``, which appears whole or not at all.

    Raises:
        OSError: A process cannot write.
    """
    path = folder / f"{run.step:08}"
    draft = path.with_name(f".{path.name}")
    if ranks.rank == 0:
        shutil.rmtree(draft, ignore_errors=True)  # what a killed run left
    with _plain_errors(f"the checkpoint {path} cannot be written"):
        dcp_save(_state(model, optimizer), checkpoint_id=draft)
    if ranks.rank == 0:
        (draft / RUN).write_text(json.dumps(asdict(run), default=str))
        shutil.rmtree(path, ignore_errors=True)  # a run resumed from an earlier one takes its place
        draft.rename(path)


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Take over the model and the optimiser, whatever mesh they were saved from.

    Raises:
        OSError: The checkpoint is damaged, or of other tensors.
    """
    state = _state(model, optimizer)
    with _plain_errors(f"--resume: {path} cannot be read"):
        dcp_load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Tell of the failures of any process in one line; every process sees them all."""
    with warnings.catch_warnings():
        if not dist.is_initialized():  # one process needs no telling that it is the only one
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            reasons = {f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}
            raise OSError(f"{what}: {'; '.join(sorted(reasons))}") from error
