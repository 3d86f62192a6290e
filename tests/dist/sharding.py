"""Models on meshes, wrapped as a user would wrap them."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.models import Transformer

# By name: the sizes of a mesh's axes. "ddp" and "copy" axes copy tensors, "fsdp" and "tp" axes cut them.
WRAPS = {"ddp2": {"ddp": 2}, "fsdp2": {"fsdp": 2}, "fsdp4": {"fsdp": 4}, "hsdp": {"copy": 2, "fsdp": 2},
         "tp": {"tp": 2}, "fsdp_tp": {"fsdp": 2, "tp": 2}}  # fmt: skip

# The same, and one process and other numbers of ranks.
LAYOUTS = {**WRAPS, "one": {}, "ddp3": {"ddp": 3}, "ddp4": {"ddp": 4}, "ddp9": {"ddp": 9},
           "fsdp1": {"fsdp": 1}, "fsdp3": {"fsdp": 3}, "fsdp9": {"fsdp": 9}, "hsdp9": {"copy": 3, "fsdp": 3},
           "fsdp_tp9": {"fsdp": 3, "tp": 3}}  # fmt: skip


def ranks(name):
    return torch.Size(LAYOUTS[name].values()).numel()


def wrap(name, dtype=torch.float32, prepare=None):
    """The small transformer, wrapped by :func:`place`; ``prepare`` may change it before that."""
    torch.manual_seed(0)
    model = Transformer().to(dtype)
    if prepare:
        prepare(model)
    return place(name, model)


def place(name, model, units=True):
    """Wrap a model; return it, the module to call, and which of how many slices of a batch is this rank's.

    With ``units``, FSDP gathers each block by itself, otherwise the whole model at once.
    """
    axes = LAYOUTS[name]
    if not axes:
        return model, model, 0, 1
    if "ddp" in axes:
        return model, DistributedDataParallel(model), dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    if "tp" in axes:
        for block in model.blocks:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
    if "fsdp" in axes:
        data_mesh = mesh["copy", "fsdp"] if "copy" in axes else mesh["fsdp"]
        for block in model.blocks if units else ():
            fully_shard(block, mesh=data_mesh)
        fully_shard(model, mesh=data_mesh)
        number = data_mesh.get_local_rank() if data_mesh.ndim == 1 else dist.get_rank()
        return model, model, number, data_mesh.size()
    return model, model, 0, 1
