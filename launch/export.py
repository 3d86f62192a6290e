"""The trained model by itself: whole, as the model of one process loads it, from whatever mesh."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from files import replacing
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

from prodigyplus import ProdigyPlusScheduleFree

SAFETENSORS = importlib.util.find_spec("safetensors") is not None


def save_model(
    folder: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks, about: Mapping[str, Any]
) -> Path:
    """Write the weights that the model holds now: ``model.safetensors``, or ``model.pt`` without safetensors.

    Every process calls it together. Training may go on after it as if nothing had been.

    Args:
        folder: Where it goes.
        model: The model, in whatever it is wrapped.
        optimizer: Warns if it has put weights of training into the model, which are not those to be used.
        ranks: The processes of the run.
        about: What it takes to build the model: ``model.json``.

    Returns:
        The file of the weights.
    """
    if isinstance(optimizer, ProdigyPlusScheduleFree) and not optimizer.holds_average:
        warnings.warn(
            "save_model: the model holds the weights of training, not their average. Call it "
            "within optimizer.averaged_parameters(), or in eval mode.",
            stacklevel=2,
        )
    path = folder / ("model.safetensors" if SAFETENSORS else "model.pt")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if ranks.rank == 0:
        with replacing(folder / "model.json") as draft:
            draft.write_text(json.dumps(about, indent=1) + "\n")
        with replacing(path) as draft:
            write(weights, draft, path.suffix)
    return path


def write(weights: Mapping[str, Any], path: Path, suffix: str) -> None:
    """Write a state dict to a file, in the format that goes with a suffix.

    Raises:
        OSError: It cannot be written.
    """
    if suffix == ".pt":
        try:
            torch.save(dict(weights), path)
        except RuntimeError as error:  # of a full disk, too
            raise OSError(str(error)) from error
    else:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            # It refuses tensors that share memory, as tied weights do.
            save_file({name: weight.detach().clone().contiguous() for name, weight in weights.items()}, path)
        except SafetensorError as error:
            raise OSError(str(error)) from error
