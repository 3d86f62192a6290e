"""Every mesh that the tests of exactness run on: its ranks, and how each parameter is placed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

# As in a transformer: wide, tall and square matrices, experts, a convolution, biases and norms.
EVEN = ((32, 64), (64, 32), (36, 36), (4, 8, 40), (36, 8, 3, 3), (64,), (32,), (4,))
# Odd sizes: on four ranks, some hold less than others, or nothing.
UNEVEN = ((33, 17), (17, 35), (37, 37), (5, 3, 41), (35, 3, 3, 3), (13,), (5,), (1,), ())
EMPTY = ((3, 40), (40, 2), (2, 33, 34), (1, 64), (64, 1), (3,), (1,), (0, 8))


def along(dim):
    """Placements that cut one dimension by a 1-D mesh; a scalar is copied."""
    return lambda shape: [Shard(dim % len(shape)) if shape else Replicate()]


def tensor_parallel(shape):
    """Tall matrices are cut along their rows, wide ones along their columns; norms and biases are copied."""
    if len(shape) < 2:
        return [Replicate()]
    return [Shard(0) if shape[0] >= shape[1] else Shard(1)]


def fsdp_and_tensor_parallel(shape):
    (inner,) = tensor_parallel(shape)
    if not shape:
        return [Replicate(), Replicate()]
    return [_StridedShard(0, split_factor=2) if inner == Shard(0) else Shard(0), inner]


def both_dims(shape):
    return [Shard(0), Shard(min(1, len(shape) - 1))] if len(shape) > 1 else [Replicate(), Replicate()]


@dataclass(frozen=True)
class Mesh:
    size: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    placements: Callable[[tuple[int, ...]], list]  # for a shape
    plain: bool = False  # whether every second parameter is a plain tensor
    experts: tuple[int, ...] | None = None  # the size of a mesh of their own for 3-D parameters

    @property
    def ranks(self):
        return math.prod(self.size)


MESHES = {
    "fsdp2": Mesh((2,), EVEN, along(0)),
    "fsdp3": Mesh((3,), EVEN, along(0)),
    "fsdp4": Mesh((4,), EVEN, along(0)),
    "last_dim": Mesh((2,), UNEVEN, along(-1)),
    "hsdp": Mesh((2, 2), EVEN, lambda shape: [Replicate(), *along(0)(shape)]),
    "tp": Mesh((2,), EVEN, tensor_parallel),
    "fsdp_tp": Mesh((2, 2), EVEN, fsdp_and_tensor_parallel),
    "fsdp_tp_uneven": Mesh((2, 2), UNEVEN, fsdp_and_tensor_parallel),
    "uneven": Mesh((4,), UNEVEN, along(0)),
    "empty": Mesh((4,), EMPTY, along(0)),
    "nine": Mesh((9,), UNEVEN, along(0)),
    "mixed": Mesh((2,), UNEVEN * 2, along(0), plain=True),  # twice 9 shapes: each is plain once
    "two_meshes": Mesh((4,), EVEN, along(0), experts=(2, 2)),
}


def for_muon(parameters, **options):
    """Groups for Muon: matrices and convolutions; batches of matrices; and, without it, the rest."""
    of = {True: [], False: [], None: []}
    for p in parameters:
        of[None if p.ndim < 2 else p.ndim == 3].append(p)
    kinds = {False: {"use_muon_pp": True}, True: {"use_muon_pp": True, "muon_batched": True}, None: {}}
    return [{"params": of[kind], **kinds[kind], **options} for kind in kinds if of[kind]]


class Placed:
    """A problem (see ``tests.single.problems.Fed``) that is cut up on a mesh."""

    def __init__(self, problem, mesh: Mesh):
        self._problem, self._mesh = problem, mesh
        self._device_mesh = init_device_mesh("cpu", mesh.size)
        self._expert_mesh = mesh.experts and init_device_mesh("cpu", mesh.experts)
        self.parameters = [
            nn.Parameter(self._place(number, p.detach())) for number, p in enumerate(problem.parameters)
        ]

    def _place(self, number: int, tensor: Tensor) -> Tensor:
        shape = tuple(tensor.shape)
        if self._mesh.plain and number % 2:
            return tensor.clone()
        if self._expert_mesh is not None and len(shape) == 3:
            return distribute_tensor(tensor, self._expert_mesh, both_dims(shape), src_data_rank=None)
        return distribute_tensor(tensor, self._device_mesh, self._mesh.placements(shape), src_data_rank=None)

    def backward(self):
        self._problem.backward()
        for number, (p, full) in enumerate(zip(self.parameters, self._problem.parameters, strict=True)):
            p.grad = self._place(number, full.grad)


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor; of a DTensor, the whole one."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def pieces_of(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
