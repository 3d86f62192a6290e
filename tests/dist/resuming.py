"""The ways to save a run and to continue it, each as a user would do it: see WAYS."""

import threading
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.dist.meshes import pieces_of, whole
from tests.single.problems import assert_same
from tests.waiting import HANG


@dataclass(frozen=True)
class Way:
    """How a run is saved and loaded.

    ==============  ==================================================================================
    ``save``
    ``"shards"``    torch's ``get_state_dict``, ``dcp.save``
    ``"async"``     the same, ``dcp.async_save``: the run goes on before anything is written
    ``"full"``      ``get_state_dict(full_state_dict=True, cpu_offload=True)``, ``torch.save`` by rank 0
    ``"plain"``     ``state_dict()`` of the model and the optimiser, whole, ``torch.save`` by rank 0
    ``load``
    ``"shards"``    ``dcp.load`` into what ``get_state_dict`` gives, ``set_optimizer_state_dict``
    ``"full"``      ``torch.load`` on every rank, ``set_optimizer_state_dict(full_state_dict=True)``
    ``"broadcast"`` the same with ``broadcast_from_rank0=True``: only rank 0's is used
    ``"whole"``     ``torch.load`` on every rank, ``set_optimizer_state_dict`` as if it were shards
    ``"plain"``     ``torch.load`` on every rank, ``optimizer.load_state_dict``
    ``"converted"`` ``dcp_to_torch_save``, then as ``"full"``
    ``flat``        ``flatten_optimizer_state_dict``
    ``mode``        the optimiser's mode when it is saved
    ``into``        what it is loaded into: a new optimiser in train or eval mode, or "used": one that
                    has trained, in eval mode
    ==============  ==================================================================================
    """

    save: str
    mode: str
    load: str
    into: str
    flat: bool = False

    @property
    def file(self):
        return f"{self.save}{'.flat' if self.flat else ''}.{self.mode}"


WAYS = (
    Way("shards", "train", "shards", "eval"),
    Way("shards", "eval", "shards", "train", flat=True),
    Way("async", "eval", "shards", "used"),
    Way("async", "train", "shards", "eval", flat=True),
    Way("full", "train", "full", "train"),
    Way("full", "eval", "broadcast", "used"),
    Way("full", "train", "broadcast", "eval"),
    Way("full", "train", "whole", "eval", flat=True),
    Way("plain", "train", "plain", "eval"),
    Way("plain", "eval", "plain", "used"),
    Way("shards", "train", "converted", "train"),
)


class Held(dcp.FileSystemWriter):
    """Writes nothing until it is released."""

    def __init__(self, path):
        super().__init__(path)
        self.released = threading.Event()

    def write_data(self, plan, planner):
        assert self.released.wait(HANG)
        return super().write_data(plan, planner)


def states_of(called, optimizer, **how):
    model, optim = get_state_dict(called, optimizer, options=StateDictOptions(**how))
    return {"model": model, "optimizer": optim}


def whole_state(optimizer):
    """A state dict with whole tensors, as one process would save it."""
    saved = optimizer.state_dict()
    saved["state"] = {
        number: {key: whole(value) for key, value in state.items()}
        for number, state in saved["state"].items()
    }
    return saved


def save(way, folder, model, called, optimizer):
    """Save a run; return a function to call once the run has gone on, which completes the save."""
    path = folder / way.file
    how = {"flatten_optimizer_state_dict": way.flat}
    if way.save == "async":
        writer = Held(path)
        saved = dcp.async_save(
            states_of(called, optimizer, **how), storage_writer=writer, process_group=dist.new_group()
        )
        return lambda: (writer.released.set(), saved.result(60))
    if way.save == "shards":
        dcp.save(states_of(called, optimizer, **how), checkpoint_id=path)
        return lambda: None
    if way.save == "full":
        states = states_of(called, optimizer, full_state_dict=True, cpu_offload=True, **how)
    else:
        weights = {name: whole(value) for name, value in model.state_dict().items()}
        states = {"model": weights, "optimizer": whole_state(optimizer)}
    if dist.get_rank() == 0:
        torch.save(states, path)
    return lambda: None


def load(way, folder, model, called, optimizer):
    path = folder / way.file
    how = {"flatten_optimizer_state_dict": way.flat}
    if way.load == "converted":
        path = path.with_suffix(".pt")
        if dist.get_rank() == 0:
            dcp_to_torch_save(folder / way.file, path)
        dist.barrier()
    if way.load == "shards":
        saved = states_of(called, optimizer, **how)
        dcp.load(saved, checkpoint_id=path)
    else:
        saved = torch.load(path, weights_only=True)

    def to_broadcast(states):
        return states if dist.get_rank() == 0 else {}

    if way.load == "shards":
        set_model_state_dict(called, saved["model"])
    elif way.load in ("full", "converted"):
        how |= {"full_state_dict": True}
        set_model_state_dict(called, saved["model"], options=StateDictOptions(full_state_dict=True))
    else:
        one = {"full_state_dict": True, "broadcast_from_rank0": True}
        set_model_state_dict(called, to_broadcast(saved["model"]), options=StateDictOptions(**one))
    if way.load == "broadcast":
        how |= one
        saved["optimizer"] = to_broadcast(saved["optimizer"])
    if way.load == "plain":
        optimizer.load_state_dict(saved["optimizer"])
    else:
        set_optimizer_state_dict(called, optimizer, saved["optimizer"], options=StateDictOptions(**how))


def assert_loaded(model, optimizer, saved):
    """Assert that every bit and dtype is as in ``saved``, whose tensors are whole (:func:`whole_state`)."""

    def cut_as(like, tensors):
        """Whole tensors, each cut as the one with its key in ``like``, without communication."""
        return {
            key: distribute_tensor(tensors[key], value.device_mesh, value.placements, src_data_rank=None)
            if isinstance(value, DTensor)
            else tensors[key]
            for key, value in like.items()
            if key in tensors
        }

    def pieces(tensors):
        return {key: pieces_of(value.detach()) for key, value in tensors.items()}

    found, expected = optimizer.state_dict(), saved["optimizer"]
    groups = len(found["param_groups"])  # a group without parameters may have been left out
    assert_same(found["param_groups"], expected["param_groups"][:groups])
    assert found["state"].keys() == expected["state"].keys()
    for number, state in found["state"].items():
        assert state.keys() == expected["state"][number].keys()
        assert_same(pieces(state), pieces(cut_as(state, expected["state"][number])), f"state.{number}")
    weights = model.state_dict()
    assert weights.keys() == saved["model"].keys()
    assert_same(pieces(weights), pieces(cut_as(weights, saved["model"])), "model")


def in_memory(optimizer):
    """The groups' numbers and this rank's pieces of the state, as they lie in memory."""
    numbers = [
        {key: float(value) if isinstance(value, torch.Tensor) else value for key, value in group.items()}
        for group in optimizer.param_groups
    ]
    parameters = [p for group in numbers for p in group.pop("params")]
    states = [
        {key: pieces_of(value).clone() for key, value in optimizer.state.get(p, {}).items()}
        for p in parameters
    ]
    return numbers, states
