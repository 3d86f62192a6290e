"""Muon on shards, side by side with other packages: which layouts run, the time of a step, what is sent.

    python benchmarks/muon_peers.py --peers FOLDER [--rounds N] [--out docs]

The other packages are not ours to ship. Each lies in a folder of its own, below FOLDER:

    pip install --no-deps --target FOLDER/dion \
        "dion @ git+https://github.com/microsoft/dion@0a059a4542e5aa74b40dcd1dce363836c7afcd48"
    pip install --no-deps --target FOLDER/muon-fsdp2 muon-fsdp2==0.3.0
    pip install --no-deps --target FOLDER/muonium muonium==0.2.0

What is not there is said, and left out. dion needs numpy; all three call torch.compile, and with it a C++
compiler. Everything runs on the CPU, in processes over gloo.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
BLOCKS, WIDTH, VOCABULARY = 4, 256, 512  # of the model that is timed
EXPERTS = 8
WARM_UP = 3  # rounds, in which what is compiled is compiled
STEPS = 2  # of which the weights are compared: the second has a momentum that is not the gradient
AGREES, WORST_AGREES = 5e-2, 0.15  # of the update, and of a parameter's: Newton–Schulz in bfloat16 is noisy
D0 = 1e-3  # of our own step size: with the default, updates are so small that float32 rounds them
LIMIT, COMPILED_LIMIT = 120, 400  # seconds for one package in one layout
ROUND_LIMIT = 20  # seconds for one more round
GRACE = 5.0  # seconds from the first failure of a rank until the others are given up
LONGEST = 200  # characters of an error
ALONE = "one process"

# --------------------------------------------------------------------------------------- packages


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A model in a layout."""

    model: nn.Module
    layout: Layout
    mesh: DeviceMesh | None  # of whatever cuts parameters; none under DDP and in one process

    @property
    def matrices(self) -> list[nn.Parameter]:
        """What Muon is for: the matrices and experts of the blocks."""
        return [p for name, p in self.model.named_parameters() if is_matrix(name, p)]

    @property
    def others(self) -> list[nn.Parameter]:
        """The rest, for AdamW."""
        return [p for name, p in self.model.named_parameters() if not is_matrix(name, p)]


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter is one that Muon is for."""
    return name.startswith("blocks.") and p.ndim >= 2


@dataclass(frozen=True, slots=True)
class Package:
    """An optimiser to compare, with its own defaults."""

    name: str
    build: Callable[[Wrapped], list[Optimizer]]
    newton_schulz: str
    home: str  # the end of a path that all its files have in theirs: what is raised there is said by it
    distribution: str = "torch"
    folder: str | None = None  # below --peers


def load(module: str, name: str) -> Any:
    """What a package has under a name.

    Raises:
        ImportError: It has not.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        raise ImportError(f"cannot import name {name!r} from {module!r}") from None


def ours(wrapped: Wrapped) -> list[Optimizer]:
    """The optimiser of this repository."""
    experts = ["*.up.weight", "*.down.weight"] if wrapped.layout.shapes == "experts" else []
    groups = load("prodigyplus", "muon_groups")(wrapped.model, batched=experts)
    if wrapped.layout.ranks == 1 and not wrapped.layout.axes:
        return [load("prodigyplus", "ProdigyPlusScheduleFree")(groups, d0=D0)]
    copies = {"replicas": dist.group.WORLD} if "ddp" in wrapped.layout.axes else {}
    return [load("prodigyplus_dist", "ShardedProdigyPlusScheduleFree")(groups, d0=D0, **copies)]


def dion(wrapped: Wrapped) -> list[Optimizer]:
    """microsoft/dion's Muon, which takes the mesh of one axis that FSDP2 shards over."""
    over: DeviceMesh | dist.ProcessGroup | None = wrapped.mesh
    if "ddp" in wrapped.layout.axes:
        over = dist.group.WORLD
    elif wrapped.mesh is not None and wrapped.mesh.ndim > 1:
        over = wrapped.mesh["fsdp"]
    groups = [{"params": wrapped.matrices}, {"params": wrapped.others, "algorithm": "adamw"}]
    return [load("dion", "Muon")(groups, distributed_mesh=over)]


def muon_fsdp2(wrapped: Wrapped) -> list[Optimizer]:
    """muon-fsdp2, whose groups all say whether they are Muon's."""
    groups = [
        {"params": wrapped.matrices, "use_muon": True},
        {"params": wrapped.others, "use_muon": False},
    ]
    return [load("muon_fsdp2", "Muon")(groups)]


def muonium(wrapped: Wrapped) -> list[Optimizer]:
    """muonium, with a matrix product in the place of its one kernel, which takes Triton and CUDA."""
    if (kernel := "muonium.kernels.gram") not in sys.modules:
        stub = ModuleType(kernel)
        stub.gram = lambda x: x @ x.mT  # type: ignore[attr-defined]
        stub.gram_ = lambda x, out: out.copy_(x @ x.mT)  # type: ignore[attr-defined]
        sys.modules[kernel] = stub
    groups = [{"params": wrapped.matrices}, {"params": wrapped.others, "algorithm": "adamw"}]
    return [load("muonium", "Muon")(groups)]


def torch_muon(wrapped: Wrapped) -> list[Optimizer]:
    """torch.optim.Muon, which takes matrices alone; the rest goes to AdamW."""
    return [torch.optim.Muon(wrapped.matrices), AdamW(wrapped.others, fused=True)]


def adamw(wrapped: Wrapped) -> list[Optimizer]:
    """AdamW for everything: what the others' times are divided by."""
    parameters = list(wrapped.model.parameters())
    cut = [p for p in parameters if isinstance(p, DTensor)]
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    # In groups of their own: one call takes no mixture.
    return [AdamW([{"params": its} for its in (cut, plain) if its], fused=True)]


QUINTIC = "5 iterations, (3.4445, −4.7750, 2.0315) in each, bfloat16"
POLAR = "5 iterations of Polar Express, (8.157, −22.48, 15.88) to (2.347, −1.710, 0.4232), bfloat16"
OURS, ADAMW = "ours", "AdamW, fused"
PACKAGES = {
    package.name: package
    for package in (
        Package(OURS, ours, POLAR, "prodigyplus", "prodigyplus-dist"),
        Package("dion", dion, POLAR, "dion", "dion", "dion"),
        Package("muon-fsdp2", muon_fsdp2, QUINTIC, "muon_fsdp2.py", "muon-fsdp2", "muon-fsdp2"),
        Package("muonium", muonium, POLAR, "muonium", "muonium", "muonium"),
        Package("torch.optim.Muon", torch_muon, QUINTIC, "_muon.py"),
        Package(ADAMW, adamw, "none", "adam.py"),
    )
}


def version(package: Package, peers: Path) -> str | None:
    """The version that is installed, with its commit if it came from git; None if it is missing."""
    if package.name == OURS:
        return "this repository"
    if package.folder is None:
        return torch.__version__
    for found in importlib.metadata.distributions(path=[str(peers / package.folder)]):
        if found.metadata["Name"] == package.distribution:
            origin = json.loads(found.read_text("direct_url.json") or "{}")
            commit = origin.get("vcs_info", {}).get("commit_id")
            return f"{found.version} at {commit[:12]}" if commit else found.version
    return None


# ---------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is spread over processes, and which model."""

    name: str
    axes: Mapping[str, int] = field(default_factory=dict)  # of the mesh
    shapes: str = "even"
    along: int = 0  # the dimension that FSDP2 cuts matrices along

    @property
    def ranks(self) -> int:
        """How many processes it takes."""
        return math.prod(self.axes.values())


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(ALONE),
        Layout("DDP 2", {"ddp": 2}),
        Layout("FSDP2 2", {"fsdp": 2}),
        Layout("FSDP2 4", {"fsdp": 4}),
        Layout("FSDP2 4, uneven", {"fsdp": 4}, shapes="uneven"),
        Layout("FSDP2 2, Shard(1)", {"fsdp": 2}, along=1),
        Layout("HSDP 2 × 2", {"copy": 2, "fsdp": 2}),
        Layout("TP 2", {"tp": 2}),
        Layout("FSDP2 × TP, 2 × 2", {"fsdp": 2, "tp": 2}),
        Layout("FSDP2 4, experts", {"fsdp": 4}, shapes="experts"),
    )
}
TIMED = {
    "DDP 2": ("DDP 2", BLOCKS),
    "FSDP2 2": ("FSDP2 2", BLOCKS),
    "FSDP2 4": ("FSDP2 4", BLOCKS),
    "FSDP2 4, one block more": (
        "FSDP2 4",
        BLOCKS + 1,
    ),  # as many matrices of a shape as no rank count divides
    "HSDP 2 × 2": ("HSDP 2 × 2", BLOCKS),
}
"""What is timed: the layout, and the blocks of the model."""


class Block(nn.Module):
    """The weights of attention and a hidden layer, or of experts."""

    def __init__(self, width: int, shapes: str) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        if shapes == "experts":
            self.up: nn.Module = Experts(width, 2 * width)
            self.down: nn.Module = Experts(2 * width, width)
        else:
            self.up = nn.Linear(width, 4 * width, bias=False)
            self.down = nn.Linear(4 * width, width, bias=False)
        if shapes == "uneven":
            self.gate = nn.Linear(width, 3, bias=True)  # the last of four ranks has nothing of it


class Experts(nn.Module):
    """A stack of matrices."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, out, width) * width**-0.5)


class Model(nn.Module):
    """The weights of a transformer. Gradients are given to it, so that all layouts have the same ones."""

    def __init__(self, shapes: str, blocks: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, shapes) for _ in range(blocks))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)


def small(shapes: str) -> Model:
    """A model to compare weights of."""
    torch.manual_seed(0)
    width, vocabulary = (61, 97) if shapes == "uneven" else (64, 96)
    return Model(shapes, 2, width, vocabulary)


def large(blocks: int) -> Model:
    """The model that is timed."""
    torch.manual_seed(0)
    return Model("even", blocks, WIDTH, VOCABULARY)


def wrap(model: Model, layout: Layout) -> Wrapped:
    """The model as a user would wrap it.

    Under DDP it is left plain: its processes have equal gradients then, and that is all.
    """
    axes = {axis: size for axis, size in layout.axes.items() if axis != "ddp"}
    if not axes:
        return Wrapped(model, layout, None)
    mesh = mesh_of(tuple(axes.items()))
    if "tp" in axes:
        plan = {
            **dict.fromkeys(("qkv", "up"), ColwiseParallel()),
            **dict.fromkeys(("out", "down"), RowwiseParallel()),
        }
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], plan)
    if "fsdp" in axes:
        inner = mesh["copy", "fsdp"] if "copy" in axes else mesh["fsdp"]
        for module in (*model.blocks, model):
            fully_shard(
                module,
                mesh=inner,
                shard_placement_fn=lambda p: Shard(layout.along if p.ndim > 1 else 0),
            )
    return Wrapped(model, layout, mesh)


@cache
def mesh_of(axes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """A mesh, the same for all models of a process: torch takes equal ones for one another."""
    names, sizes = zip(*axes, strict=True)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def like(p: Tensor, full: Tensor) -> Tensor:
    """What this process has of a tensor that lies as a parameter does."""
    if not isinstance(p, DTensor):
        return full.clone()
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Whole gradients, of a few directions and noise, for a model that is not wrapped."""
    generator = torch.Generator().manual_seed(seed)

    def one(p: Tensor) -> Tensor:
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim < 2:
            return noise
        left = torch.randn(*p.shape[:-1], 4, generator=generator)
        return 0.1 * noise + left @ torch.randn(*p.shape[:-2], 4, p.shape[-1], generator=generator)

    return {name: 1e-2 * one(p) for name, p in model.named_parameters()}


# --------------------------------------------------------------------------------------- counting


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives, what this rank sends in them, and products of matrices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: Counter[str] = Counter()
        self.sent = 0.0
        self.products = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as what DTensor makes of it
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            if name not in NOTHING_SENT:
                kind, sent = SENT[name](*args)
                self.collectives[kind] += 1
                self.sent += sent
        elif name in ("mm", "bmm", "addmm", "baddbmm"):
            factor = args[-2]
            self.products += result.shape[0] if result.ndim == 3 else 1
            self.flops += 2 * result.numel() * factor.shape[-1]
        return result


def nbytes(tensors: Tensor | Sequence[Any]) -> int:
    """The bytes of tensors, which may be nested."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(nbytes, tensors))


def group_of(group: Any) -> dist.ProcessGroup:
    """A process group of a collective's arguments: one in a box, or its name."""
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def ring(kind: str, whole: int, group: Any, *, times: int = 1) -> tuple[str, float]:
    """What a rank sends in a ring of a tensor that has so many bytes when it is whole."""
    size = group_of(group).size()
    return kind, times * whole * (size - 1) / size


def rooted(kind: str, sent: int, group: Any, *, sends: bool) -> tuple[str, float]:
    """What a rank sends to or from one."""
    return kind, sent if sends and group_of(group).size() > 1 else 0


def scattered(inputs: Sequence[Any], group: Any) -> tuple[str, float]:
    """What the root sends of pieces, of which it keeps its own."""
    mine = group_of(group).rank()
    pieces = [nbytes(piece) for piece in (inputs[0] if inputs else ())]
    return "scatter", sum(pieces) - (pieces[mine] if pieces else 0)


def all_to_all(pieces: Sequence[int], group: Any) -> tuple[str, float]:
    """What a rank sends of pieces of so many bytes, of which it keeps its own."""
    return "all-to-all", sum(pieces) - pieces[group_of(group).rank()]


def split(tensor: Tensor, splits: Sequence[int], group: Any) -> list[int]:
    """The bytes of the pieces that a tensor is cut into; equal ones, if nothing is said."""
    size = group_of(group).size()
    if not splits:
        return [nbytes(tensor) // size] * size
    row = nbytes(tensor) // max(1, tensor.shape[0])
    return [rows * row for rows in splits]


NOTHING_SENT = {"wait_tensor", "barrier", "mesh_get_process_group", "_wrap_tensor_autograd"}
# What is made of the arguments of torch's operators: the kind, and the bytes that this rank sends. One that
# is not here is an error, not nothing.
SENT: dict[str, Callable[..., tuple[str, float]]] = {
    "allreduce_": lambda x, group, *_: ring("all-reduce", nbytes(x), group, times=2),
    "all_reduce": lambda x, _, group: ring("all-reduce", nbytes(x), group, times=2),
    "all_reduce_": lambda x, _, group: ring("all-reduce", nbytes(x), group, times=2),
    "allgather_": lambda out, _, group, *__: ring("all-gather", nbytes(out), group),
    "_allgather_base_": lambda out, _, group, *__: ring("all-gather", nbytes(out), group),
    "all_gather_into_tensor": lambda x, size, group: ring("all-gather", size * nbytes(x), group),
    "all_gather_into_tensor_coalesced": lambda x, size, group: ring("all-gather", size * nbytes(x), group),
    "reduce_scatter_": lambda _, x, group, *__: ring("reduce-scatter", nbytes(x), group),
    "_reduce_scatter_base_": lambda _, x, group, *__: ring("reduce-scatter", nbytes(x), group),
    "reduce_scatter_tensor": lambda x, _, __, group: ring("reduce-scatter", nbytes(x), group),
    "broadcast_": lambda x, group, *_: ring("broadcast", nbytes(x), group),
    "broadcast": lambda x, _, group: ring("broadcast", nbytes(x), group),
    "gather_": lambda _, x, group, root, *__: rooted(
        "gather", nbytes(x), group, sends=group_of(group).rank() != root
    ),
    "scatter_": lambda _, x, group, *__: scattered(x, group),
    "alltoall_": lambda _, x, group, *__: all_to_all([nbytes(piece) for piece in x], group),
    "alltoall_base_": lambda _, x, group, __, splits, *___: all_to_all(split(x, splits, group), group),
    "all_to_all_single": lambda x, _, splits, group: all_to_all(split(x, splits, group), group),
    "shard_dim_alltoall": lambda x, _, __, group: all_to_all(split(x, (), group), group),
    "send": lambda x, group, *_: rooted("send", nbytes(x), group, sends=True),
    "recv_": lambda x, group, *_: rooted("receive", 0, group, sends=False),
}


@dataclass(frozen=True, slots=True)
class Count:
    """What a step does on one rank."""

    collectives: dict[str, int]
    sent: float
    products: int  # of matrices
    flops: int


# ------------------------------------------------------------------------------------ in a worker


class Stepped:
    """A package on a wrapped model, and the gradients to feed it."""

    def __init__(self, name: str, model: Model, layout: Layout) -> None:
        whole = [gradients(model, seed) for seed in range(STEPS)]
        self.name = name
        self.wrapped = wrap(model, layout)
        self._optimizers = PACKAGES[name].build(self.wrapped)
        self._fed = [
            {key: like(p, full[key]) for key, p in self.wrapped.model.named_parameters()} for full in whole
        ]
        self._at = 0

    def feed(self) -> None:
        """Give every parameter a gradient of its own."""
        fed = self._fed[self._at % len(self._fed)]
        for name, p in self.wrapped.model.named_parameters():
            p.grad = fed[name].clone()  # some packages write into it
        self._at += 1

    def step(self) -> None:
        """A step of the optimiser alone."""
        for optimizer in self._optimizers:
            optimizer.step()

    def count(self) -> Count:
        """What one more step does. It is not compiled, so that all operations are seen."""
        self.feed()
        with torch.compiler.set_stance("force_eager"), Watch() as watch:
            self.step()
        return Count(dict(watch.collectives), watch.sent, watch.products, watch.flops)


def stepped_weights(name: str, layout: Layout) -> dict[str, Tensor]:
    """Whole weights after a few steps in one process."""
    stepped = Stepped(name, small(layout.shapes), layout)
    for _ in range(STEPS):
        stepped.feed()
        stepped.step()
    return {key: local(p).clone() for key, p in stepped.wrapped.model.named_parameters()}


def squares_off(name: str, layout: Layout, expected: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """For each parameter that this rank has a part of: squares of what is off, and of the whole update."""
    stepped = Stepped(name, small(layout.shapes), layout)
    before = dict(small(layout.shapes).named_parameters())
    for key, p in stepped.wrapped.model.named_parameters():
        assert torch.equal(local(p), local(like(p, before[key].detach()))), key
    for _ in range(STEPS):
        stepped.feed()
        stepped.step()
    squares = {}
    for key, p in stepped.wrapped.model.named_parameters():
        wanted = local(like(p, expected[key])).double()
        start = local(like(p, before[key].detach())).double()
        off, update = local(p).double() - wanted, wanted - start
        squares[key] = off.square().sum().item(), update.square().sum().item()
    return squares


def count_alone(name: str, layout: Layout, blocks: int) -> Count:
    """What one process does in a step of the model that is timed."""
    stepped = Stepped(name, large(blocks), layout)
    stepped.feed()
    stepped.step()
    return stepped.count()


def interleaved(
    names: Sequence[str], layout: Layout, blocks: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, Count]]:
    """The seconds of this rank's steps, all packages in turn, and what each does in a step."""
    every = [Stepped(name, large(blocks), layout) for name in names]
    turns = range(-WARM_UP, rounds)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in turns:
        first = number % len(every)
        for stepped in every[first:] + every[:first]:
            stepped.feed()
            dist.barrier()
            start = time.perf_counter()
            stepped.step()
            if number >= 0:
                times[stepped.name].append(time.perf_counter() - start)
    dist.barrier()
    return times, {stepped.name: stepped.count() for stepped in every}


# ------------------------------------------------------------------------------------- processes


class PackageError(Exception):
    """What went wrong, and whether the package itself said so."""

    def __init__(self, said: str, kind: Literal["refuses", "crashes", "hangs", "is missing"]) -> None:
        super().__init__(said, kind)
        self.said, self.kind = said, kind


def problem_of(error: Exception, home: str) -> PackageError:
    """What a package's exception tells."""
    said = f"{type(error).__name__}: {first_line(str(error))}"
    if isinstance(error, ImportError):
        return PackageError(said, "is missing")
    last = traceback.extract_tb(error.__traceback__)[-1]
    stated = re.match(r"(raise|assert)\b", last.line or "")
    return PackageError(said, "refuses" if stated and home in last.filename else "crashes")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands."""

    connection: Connection
    home: str  # of the package that it runs
    rank: int
    size: int
    folder: Path  # that its ranks share
    limit: float


def first_line(text: str) -> str:
    """The first line of a message, without the place in C++ that it may begin with."""
    line = re.sub(r"^\[[^]]*\] *", "", (text.strip() or "(no message)").splitlines()[0])
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"


def worker(place: Place, peers: Path, compiled: bool, task: Any) -> None:
    """A process: does what it is told, and sends back the result, or when and how it failed."""
    torch.set_num_threads(1)
    if not compiled:
        torch.compiler.set_stance("force_eager")
    sys.path[:0] = [str(ROOT), *(str(peers / p.folder) for p in PACKAGES.values() if p.folder is not None)]
    function, *args = task
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place.folder / 'store'}",
        rank=place.rank,
        world_size=place.size,
        timeout=datetime.timedelta(seconds=place.limit),
    )
    try:
        outcome = True, function(*args)
    except Exception as error:
        traceback.print_exc()
        outcome = False, (time.monotonic(), problem_of(error, place.home))
    place.connection.send(outcome)
    place.connection.recv()  # a process that ends early breaks what others are still sending


class Runner:
    """Starts processes, and waits for what they return."""

    def __init__(self, peers: Path, *, compiled: bool, verbose: bool) -> None:
        self._peers, self._compiled, self._verbose = peers, compiled, verbose
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["prodigyplus_dist", "torch.distributed.fsdp", "torch.distributed.tensor"]
        )

    def run(self, size: int, home: str, *task: Any, rounds: int = 0) -> list[Any]:
        """The results of a function on every rank.

        Raises:
            PackageError: The first failure of a rank.
        """
        limit = (COMPILED_LIMIT if self._compiled else LIMIT) + rounds * ROUND_LIMIT
        with tempfile.TemporaryDirectory() as folder:
            ends, processes = [], []
            for rank in range(size):
                here, there = self._context.Pipe()
                args = Place(there, home, rank, size, Path(folder), limit), self._peers, self._compiled, task
                processes.append(
                    self._context.Process(target=worker if self._verbose else quietly, args=args, daemon=True)
                )
                processes[-1].start()
                there.close()
                ends.append(here)
            try:
                return gathered(ends, limit, Path(folder))
            finally:
                for end, process in zip(ends, processes, strict=True):
                    with suppress(OSError):
                        end.send(None)
                    process.kill()
                    process.join()
                    end.close()


def gathered(ends: Sequence[Connection], limit: float, folder: Path) -> list[Any]:
    """What the processes at these ends answer, in that order."""
    results: dict[int, Any] = {}
    failures: list[tuple[float, PackageError]] = []
    waiting: dict[Any, int] = {end: rank for rank, end in enumerate(ends)}
    until = time.monotonic() + limit
    while waiting and (left := until - time.monotonic()) > 0:
        for end in wait(list(waiting), timeout=left):
            rank = waiting.pop(end)
            try:
                good, value = ends[rank].recv()
            except (EOFError, ConnectionResetError):
                good, value = False, (time.monotonic(), PackageError(last_words(folder, rank), "crashes"))
            if good:
                results[rank] = value
            else:
                failures.append(value)
                until = min(until, time.monotonic() + GRACE)
    if failures:  # the first; but that a connection is gone is the fault of the rank at its other end
        raise min(failures, key=lambda failure: ("Connection" in failure[1].said, failure[0]))[1]
    if waiting:
        raise PackageError(f"{len(waiting)} of {len(ends)} ranks had not ended in {limit:.0f} s", "hangs")
    return [results[rank] for rank in range(len(ends))]


def quietly(place: Place, *args: Any) -> None:
    """A worker that says nothing, but writes it down."""
    written = os.open(said_by(place.folder, place.rank), os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(written, stream)
    worker(place, *args)


def said_by(folder: Path, rank: int) -> Path:
    """The file of what a process says."""
    return folder / f"{rank}.txt"


def last_words(folder: Path, rank: int) -> str:
    """What a process that died wrote of the exception that C++ ended it for."""
    file = said_by(folder, rank)
    written = file.read_text(errors="replace") if file.exists() else ""
    _, _, what = written.rpartition("what():")
    return f"the process died: {first_line(what)}"


# --------------------------------------------------------------------------------------- measured


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far weights are from those of one process, of the update."""

    whole: float
    worst: float  # of a parameter

    @property
    def good(self) -> bool:
        """Whether it is as near as the noise allows."""
        return self.whole <= AGREES and self.worst <= WORST_AGREES


class Comparison:
    """The packages, and what is known of them."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._weights: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._agreements: dict[tuple[str, str], Agreement | PackageError] = {}

    def agreement(self, name: str, layout: Layout) -> Agreement | PackageError:
        """How near a layout comes to one process, or why it does not run."""
        key = name, layout.name
        if key not in self._agreements:
            try:
                self._agreements[key] = self._agreement(name, layout)
            except PackageError as problem:
                self._agreements[key] = problem
        return self._agreements[key]

    def _agreement(self, name: str, layout: Layout) -> Agreement:
        if layout.ranks == 1:
            self._weights[name, layout.shapes] = self._run(name, layout, stepped_weights)[0]
        elif (name, layout.shapes) not in self._weights:
            self._weights[name, layout.shapes] = self._alone(name, stepped_weights, layout.shapes)
        expected = self._weights[name, layout.shapes]
        every = self._run(name, layout, squares_off, expected)
        off = {key: sum(squares[key][0] for squares in every) for key in expected}
        update = {key: sum(squares[key][1] for squares in every) for key in expected}
        each = [math.sqrt(off[key] / update[key]) if update[key] else math.inf for key in expected]
        return Agreement(math.sqrt(sum(off.values()) / sum(update.values())), max(each))

    def count_alone(self, name: str, blocks: int) -> Count:
        """What one process does in a step of the model that is timed."""
        count: Count = self._alone(name, count_alone, "even", blocks)
        return count

    def times(
        self, names: Sequence[str], layout: Layout, blocks: int, rounds: int
    ) -> tuple[dict[str, list[float]], dict[str, list[Count]]]:
        """Each round's seconds of the slowest rank, and what each rank does in a step."""
        task = interleaved, names, layout, blocks, rounds
        every = self._runner.run(layout.ranks, "", *task, rounds=rounds)
        slowest = {
            name: [max(ranks) for ranks in zip(*(times[name] for times, _ in every), strict=True)]
            for name in names
        }
        return slowest, {name: [counts[name] for _, counts in every] for name in names}

    def _run(self, name: str, layout: Layout, function: Callable[..., Any], *args: Any) -> list[Any]:
        return self._runner.run(layout.ranks, PACKAGES[name].home, function, name, layout, *args)

    def _alone(self, name: str, function: Callable[..., Any], shapes: str, *args: Any) -> Any:
        """In one process, or, for a package that takes no plain tensors, under FSDP2 on one."""
        try:
            return self._run(name, Layout(ALONE, shapes=shapes), function, *args)[0]
        except PackageError:
            return self._run(name, Layout("FSDP2 1", {"fsdp": 1}, shapes), function, *args)[0]


# ---------------------------------------------------------------------------------------- report

SAID = f"""\
All packages with their own defaults, the matrices of the blocks under Muon, and embedding, head and norms
under the AdamW that each brings (torch's, for torch.optim.Muon). Gradients are given, the same in every
layout, so that what differs is the optimiser's.

- muonium: a product of matrices stands in the place of its kernel for `X Xᵀ`, which takes Triton and CUDA.
  What runs is its driver for tensors one by one, since the batched one takes CUDA.
- dion, muon-fsdp2 and muonium call `torch.compile`. Here it {{compiles}}.
- DDP: plain tensors with equal gradients in every process.
- TP: matrices cut by `ColwiseParallel` and `RowwiseParallel`, and plain tensors beside them.
- Ours starts from `d0={D0}`, which changes the size of updates, not their cost.
"""

LAYOUTS_SAID = f"""\
"Runs" with the distance from the same package in one process (muon-fsdp2: FSDP2 on one), of all weights and,
in brackets, of the worst tensor, relative to the update. It is taken after {STEPS} steps of a small model:
two blocks of width 64, in one layout with stacks of {EXPERTS} experts; in the uneven one of width 61, with a
matrix of three rows. *Off*: above {AGREES:g}, or {WORST_AGREES:g} of a tensor. A package *refuses* what its
own code raises an error for, and *crashes* by any other.
"""

TIMES_SAID = f"""\
A model of width {WIDTH}, float32. A round is a step of every package, in an order that turns; a step's time
is that of the slowest rank, from a barrier on. Ratios are of the same round: the median of {{rounds}} rounds,
and between which two the middle half of them lies.

"Sent" is what a rank sends in a step, on average and at most: 2n(S−1)/S in an all-reduce of n bytes over S
ranks, n(S−1)/S in an all-gather, a reduce-scatter or a broadcast of n bytes in all, and what leaves the rank
in all others. "Matrices" are those that ranks orthogonalise in a step, once for each rank that takes part,
padding among them. "Work" is in products of matrices, where one process does 1: of all ranks, and of the
busiest."""


def head(names: Iterable[str], aligned: str = "---") -> str:
    """The first lines of a table."""
    names = list(names)
    return f"| {' | '.join(names)} |\n|---|{f'{aligned}|' * (len(names) - 1)}"


def layout_table(comparison: Comparison, names: Sequence[str], layouts: Sequence[str]) -> Iterator[str]:
    """Which layouts run, and the errors below; a line at a time."""
    yield head(["", *names])
    notes: dict[str, int] = {}
    for layout in layouts:
        cells = []
        for name in names:
            found = comparison.agreement(name, LAYOUTS[layout])
            if isinstance(found, PackageError):
                number = notes.setdefault(found.said, len(notes) + 1)
                cells.append(f"{found.kind} [{number}]")
            else:
                runs = "runs" if found.good else "runs, *off*"
                cells.append(f"{runs} {short(found.whole)} ({short(found.worst)})")
        yield f"| {layout} | {' | '.join(cells)} |"
    yield ""
    for said, number in notes.items():
        code = said.replace("`", "'")
        yield f"{number}. `{code}`"


def short(value: float) -> str:
    """A few digits."""
    if value == 0:
        return "0"
    if value < 1e-3:
        return f"{value:.0e}"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """The median, and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{short(middle)} ({short(low)}–{short(high)})"


TIMES_HEAD = """\
| | ms | ÷ AdamW | ÷ ours | sent, MB | at most | collectives | matrices | work | busiest |
|---|--:|--:|--:|--:|--:|---|--:|--:|--:|"""


def times_table(comparison: Comparison, there: Sequence[str], timing: str, rounds: int) -> Iterator[str]:
    """Times and counts in a layout, of the packages that run in it; a line at a time."""
    layout, blocks = LAYOUTS[TIMED[timing][0]], TIMED[timing][1]
    names = [name for name in there if not isinstance(comparison.agreement(name, layout), PackageError)]
    parameters = list(large(blocks).named_parameters())
    matrices = sum(is_matrix(name, p) for name, p in parameters)
    yield (
        f"{blocks} blocks: {matrices} matrices and {len(parameters) - matrices} other tensors, "
        f"{sum(p.numel() for _, p in parameters) / 1e6:.2f} · 10⁶ parameters.\n"
    )
    try:
        times, counts = comparison.times(names, layout, blocks, rounds)
    except PackageError as problem:
        yield f"No times: {problem.kind}, {problem.said}"
        return
    yield TIMES_HEAD
    for name in names:
        ratios = [
            spread([a / b for a, b in zip(times[name], times[base], strict=True)]) if base in times else "–"
            for base in (ADAMW, OURS)
        ]
        work = "– | – | –"
        alone = comparison.count_alone(name, blocks)
        if alone.products:
            done = matrices * sum(count.products for count in counts[name]) / alone.products
            flops = [count.flops / alone.flops for count in counts[name]]
            work = f"{done:.0f} | {sum(flops):.2f} | {max(flops):.2f}"
        sent = [count.sent / 1e6 for count in counts[name]]
        yield (
            f"| {name} | {short(1000 * statistics.median(times[name]))} | {' | '.join(ratios)} "
            f"| {statistics.mean(sent):.2f} | {max(sent):.2f} | {collectives(counts[name])} | {work} |"
        )


def collectives(counts: Sequence[Count]) -> str:
    """What the rank with most of a kind takes part in."""
    most: Counter[str] = Counter()
    for count in counts:
        most |= Counter(count.collectives)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(most.items())) or "none"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True, metavar="FOLDER", help="see above")
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=list(PACKAGES), metavar="NAME")
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--timed", nargs="*", choices=TIMED, default=list(TIMED), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--compiled", action="store_true", help="compile what packages compile: many minutes more"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for muon_peers.md")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    for variable in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ[variable] = "1"

    lines: list[str] = []

    def tell(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    # The folder, which is the reader's own, is told by its name in the docstring.
    shown = ["FOLDER" if word == str(args.peers) else word for word in arguments]
    tell(
        f"# Muon beside other packages\n\n    {shlex.join(['python', 'benchmarks/muon_peers.py', *shown])}\n"
    )
    tell(
        f"torch {torch.__version__}, Python {platform.python_version()}; one to four processes of one thread "
        f"each over gloo, on {os.cpu_count()} cores of a CPU.\n"
    )
    tell(SAID.format(compiles="does" if args.compiled else "does not, which `--compiled` changes"))
    tell(head(["", "version", "Newton–Schulz"]))
    versions = {name: version(PACKAGES[name], args.peers) for name in args.packages}
    for name, found in versions.items():
        tell(f"| {name} | {found or '**missing**'} | {PACKAGES[name].newton_schulz} |")
    there = [name for name, found in versions.items() if found]
    comparison = Comparison(Runner(args.peers.resolve(), compiled=args.compiled, verbose=args.verbose))
    if args.layouts:
        tell(f"\n## Layouts\n\n{LAYOUTS_SAID}")
        for line in layout_table(comparison, there, args.layouts):
            tell(line)
    if args.timed:
        tell(f"\n## Times\n\n{TIMES_SAID.format(rounds=args.rounds)}")
    for timing in args.timed:
        tell(f"\n### {timing}\n")
        for line in times_table(comparison, there, timing, args.rounds):
            tell(line)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "muon_peers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
