"""Export of the trained model: unsharded weights, which a single process can load, from any mesh."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from files import replacing
from optimizers import averaged
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

SAFETENSORS = importlib.util.find_spec("safetensors") is not None


def save_model(
    folder: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks, config: Mapping[str, Any]
) -> Path:
    """Write the averaged weights to ``model.safetensors``, or ``model.pt`` without safetensors.

    All processes call it together. It leaves the training state unchanged.

    Args:
        folder: Where the files go.
        model: The model, wrapped or sharded in any way.
        optimizer: Its optimiser.
        ranks: The processes of the run.
        config: The arguments that build the model, written to ``model.json``.

    Returns:
        The path of the weights.
    """
    path = folder / ("model.safetensors" if SAFETENSORS else "model.pt")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with averaged(optimizer):
        weights = get_model_state_dict(model, options=options)
        if ranks.rank == 0:
            with replacing(folder / "model.json") as draft:
                draft.write_text(json.dumps(config, indent=1) + "\n")
            with replacing(path) as draft:
                write(weights, draft, path.suffix)
    return path


def write(weights: Mapping[str, Any], path: Path, suffix: str) -> None:
    """Write a state dict to a file, in the format of a suffix.

    Raises:
        OSError: It cannot be written.
    """
    if suffix == ".pt":
        try:
            torch.save(dict(weights), path)
        except RuntimeError as error:  # torch raises it for a full disk
            raise OSError(str(error)) from error
    else:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
            save_file({name: weight.detach().clone().contiguous() for name, weight in weights.items()}, path)
        except SafetensorError as error:
            raise OSError(str(error)) from error
