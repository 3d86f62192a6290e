"""Device meshes from the command line, and a GPT parallelised over one."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from gpt import GPT
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

# Split between heads and between hidden units; `out` and `down` sum the partial results. The norms and the
# embedding, of 256 rows, stay replicated: their inputs and gradients are the same in every process.
TENSOR_PARALLEL = {
    "blocks.*.attention.qkv": ColwiseParallel(),
    "blocks.*.attention.out": RowwiseParallel(),
    "blocks.*.mlp.gate": ColwiseParallel(),
    "blocks.*.mlp.up": ColwiseParallel(),
    "blocks.*.mlp.down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


@dataclass(frozen=True, slots=True)
class MeshShape:
    """The sizes of the axes that replicate the model, shard it (``fsdp``) and split its layers (``tp``).

    Ranks vary fastest along the last axis, so that tensor parallelism stays within a node.
    """

    replicate: int = 1
    fsdp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.data_parallel * self.tp

    @property
    def data_parallel(self) -> int:
        """The number of processes over which a batch is split."""
        return self.replicate * self.fsdp

    def __str__(self) -> str:
        return ",".join(f"{f.name}={n}" for f in fields(self) if (n := getattr(self, f.name)) > 1) or "fsdp=1"


def parse_mesh(text: str | None, processes: int) -> MeshShape:
    """The mesh that ``--mesh`` names, such as ``replicate=2,fsdp=4,tp=2``; without it, all are ``fsdp``.

    Raises:
        ValueError: It is not a mesh, or does not have this number of processes.
    """
    if text is None:
        return MeshShape(fsdp=processes)
    allowed = [f.name for f in fields(MeshShape)]
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        axis, _, size = (part.strip() for part in entry.partition("="))
        if axis not in allowed or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh {text}: {entry!r} is not one of {', '.join(f'{axis}=N' for axis in allowed)}, each "
                "at most once and N at least 1."
            )
        sizes[axis] = int(size)
    shape = MeshShape(**sizes)
    if shape.size != processes:
        raise ValueError(
            f"--mesh {text} is a mesh of {shape.size} processes, but there are {processes}: the sizes of "
            f"{', '.join(allowed)} must multiply to {processes}."
        )
    return shape


def device_mesh(shape: MeshShape, device: torch.device) -> DeviceMesh:
    """The mesh, without axes of size 1 that nothing needs."""
    sizes = {"replicate": shape.replicate, "fsdp": shape.fsdp, "tp": shape.tp}
    if shape.tp == 1:
        del sizes["tp"]
    elif shape.data_parallel == 1:
        del sizes["fsdp"]
    if shape.replicate == 1:
        del sizes["replicate"]
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def parallelize_(model: GPT, mesh: DeviceMesh) -> None:
    """Split the layers over ``tp``, then shard every block and the root module over the other axes."""
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        parallelize_module(model, mesh["tp"], TENSOR_PARALLEL)
    if "fsdp" not in names:
        return
    data_mesh = mesh["replicate", "fsdp"] if "replicate" in names else mesh["fsdp"]
    on_gpu = mesh.device_type == "cuda"
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if on_gpu else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=data_mesh, mp_policy=precision)
    fully_shard(model, mesh=data_mesh, mp_policy=precision)
