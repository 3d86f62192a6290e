"""Muon on shards, compared with other packages: which layouts run, the time of a step, what is sent.

    python benchmarks/muon_peers.py --peers FOLDER [--rounds N] [--out docs]

The other packages are installed into folders of their own below FOLDER, if they are not there yet.
Those that cannot be installed are reported and left out. dion needs numpy; all three call torch.compile,
which needs a C++ compiler. Everything runs on the CPU, in processes over gloo.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from harness import ROOT
from harness.peers import DION, MUON_FSDP2, MUONIUM, Peer, PeerError, install, load
from harness.tables import Page, milliseconds, parser, ratios, spread
from harness.tables import digits as short
from harness.tensors import local
from harness.watching import Call, Watch, collective
from harness.workers import WorkerError, on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import AdamW, Optimizer

BLOCKS, WIDTH, VOCABULARY = 4, 256, 512  # of the model that is timed
EXPERTS = 8
WARM_UP = 3  # rounds, in which packages compile
STEPS = 2  # after which weights are compared: in the second, momentum is not the gradient
AGREES, WORST_AGREES = 5e-2, 0.15  # of the update, and of a parameter's: Newton–Schulz in bfloat16 is noisy
D0 = 1e-3  # of our own step size: with the default, updates are so small that float32 rounds them
LIMIT, COMPILED_LIMIT = 120, 400  # seconds for one package in one layout
ROUND_LIMIT = 20  # seconds for one more round
ALONE = "one process"

# --------------------------------------------------------------------------------------- packages


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A model in a layout."""

    model: nn.Module
    layout: Layout
    mesh: DeviceMesh | None  # over which parameters are cut; none under DDP and in one process

    @property
    def matrices(self) -> list[nn.Parameter]:
        """What Muon trains: the matrices and experts of the blocks."""
        return [p for name, p in self.model.named_parameters() if is_matrix(name, p)]

    @property
    def others(self) -> list[nn.Parameter]:
        """The rest, for AdamW."""
        return [p for name, p in self.model.named_parameters() if not is_matrix(name, p)]


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter is one that Muon trains."""
    return name.startswith("blocks.") and p.ndim >= 2


@dataclass(frozen=True, slots=True)
class Package:
    """An optimiser to compare, with its own defaults."""

    name: str
    build: Callable[[Wrapped], list[Optimizer]]
    newton_schulz: str
    home: str  # part of the path of all its files, which shows whether an error is its own
    peer: Peer | None = None


def ours(wrapped: Wrapped) -> list[Optimizer]:
    """The optimiser of this repository."""
    experts = ["*.up.weight", "*.down.weight"] if wrapped.layout.shapes == "experts" else []
    groups = load("prodigyplus:muon_groups")(wrapped.model, batched=experts)
    if wrapped.layout.ranks == 1 and not wrapped.layout.axes:
        return [load("prodigyplus:ProdigyPlusScheduleFree")(groups, d0=D0)]
    copies = {"replicas": dist.group.WORLD} if "ddp" in wrapped.layout.axes else {}
    return [load("prodigyplus_dist:ShardedProdigyPlusScheduleFree")(groups, d0=D0, **copies)]


def dion(wrapped: Wrapped) -> list[Optimizer]:
    """microsoft/dion's Muon, which takes the mesh of one axis that FSDP2 shards over."""
    over: DeviceMesh | dist.ProcessGroup | None = wrapped.mesh
    if "ddp" in wrapped.layout.axes:
        over = dist.group.WORLD
    elif wrapped.mesh is not None and wrapped.mesh.ndim > 1:
        over = wrapped.mesh["fsdp"]
    groups = [{"params": wrapped.matrices}, {"params": wrapped.others, "algorithm": "adamw"}]
    return [load("dion:Muon")(groups, distributed_mesh=over)]


def muon_fsdp2(wrapped: Wrapped) -> list[Optimizer]:
    """muon-fsdp2, each of whose groups says whether it is Muon's."""
    groups = [
        {"params": wrapped.matrices, "use_muon": True},
        {"params": wrapped.others, "use_muon": False},
    ]
    return [load("muon_fsdp2:Muon")(groups)]


def muonium(wrapped: Wrapped) -> list[Optimizer]:
    """muonium, with a matrix product for its one kernel, which needs Triton and CUDA."""
    if (kernel := "muonium.kernels.gram") not in sys.modules:
        stub = ModuleType(kernel)
        stub.gram = lambda x: x @ x.mT  # type: ignore[attr-defined]
        stub.gram_ = lambda x, out: out.copy_(x @ x.mT)  # type: ignore[attr-defined]
        sys.modules[kernel] = stub
    groups = [{"params": wrapped.matrices}, {"params": wrapped.others, "algorithm": "adamw"}]
    return [load("muonium:Muon")(groups)]


def torch_muon(wrapped: Wrapped) -> list[Optimizer]:
    """torch.optim.Muon, which takes only matrices; the rest goes to AdamW."""
    return [torch.optim.Muon(wrapped.matrices), AdamW(wrapped.others, fused=True)]


def adamw(wrapped: Wrapped) -> list[Optimizer]:
    """AdamW for everything: the others' times are divided by its time."""
    parameters = list(wrapped.model.parameters())
    cut = [p for p in parameters if isinstance(p, DTensor)]
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    # In separate groups: one call cannot mix them.
    return [AdamW([{"params": its} for its in (cut, plain) if its], fused=True)]


QUINTIC = "5 iterations, (3.4445, −4.7750, 2.0315) in each, bfloat16"
POLAR = "5 iterations of Polar Express, (8.157, −22.48, 15.88) to (2.347, −1.710, 0.4232), bfloat16"
OURS, ADAMW = "ours", "AdamW, fused"
PACKAGES = {
    package.name: package
    for package in (
        Package(OURS, ours, POLAR, "prodigyplus"),
        Package("dion", dion, POLAR, "dion", DION),
        Package("muon-fsdp2", muon_fsdp2, QUINTIC, "muon_fsdp2.py", MUON_FSDP2),
        Package("muonium", muonium, POLAR, "muonium", MUONIUM),
        Package("torch.optim.Muon", torch_muon, QUINTIC, "_muon.py"),
        Package(ADAMW, adamw, "none", "adam.py"),
    )
}


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
    # A number of matrices of one shape that no number of ranks divides.
    "FSDP2 4, one block more": ("FSDP2 4", BLOCKS + 1),
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
            self.gate = nn.Linear(width, 3, bias=True)  # the last of four ranks has no part of it


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
    """A model whose weights are compared."""
    torch.manual_seed(0)
    width, vocabulary = (61, 97) if shapes == "uneven" else (64, 96)
    return Model(shapes, 2, width, vocabulary)


def large(blocks: int) -> Model:
    """The model that is timed."""
    torch.manual_seed(0)
    return Model("even", blocks, WIDTH, VOCABULARY)


def wrap(model: Model, layout: Layout) -> Wrapped:
    """The model as a user would wrap it.

    Under DDP it stays plain, since its processes have equal gradients anyway.
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
            fully_shard(module, mesh=inner, shard_placement_fn=lambda p: Shard(layout.along * (p.ndim > 1)))
    return Wrapped(model, layout, mesh)


@cache
def mesh_of(axes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """A mesh, the same for all models of a process: torch treats equal meshes as one."""
    names, sizes = zip(*axes, strict=True)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def like(p: Tensor, full: Tensor) -> Tensor:
    """The part of a tensor that this process holds, if it is placed as a parameter is."""
    if not isinstance(p, DTensor):
        return full.clone()
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


def gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Whole gradients, made of a few directions and noise, for a model that is not wrapped."""
    generator = torch.Generator().manual_seed(seed)

    def one(p: Tensor) -> Tensor:
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim < 2:
            return noise
        left = torch.randn(*p.shape[:-1], 4, generator=generator)
        return 0.1 * noise + left @ torch.randn(*p.shape[:-2], 4, p.shape[-1], generator=generator)

    return {name: 1e-2 * one(p) for name, p in model.named_parameters()}


# --------------------------------------------------------------------------------------- counting


@dataclass(frozen=True, slots=True)
class Count:
    """What a step does on one rank."""

    collectives: Counter[str]
    sent: float
    products: int  # of matrices
    flops: int


def products(call: Call) -> tuple[int, int]:
    """The matrix products in a call, and their operations."""
    if call.name not in ("mm", "bmm", "addmm", "baddbmm"):
        return 0, 0
    count = call.result.shape[0] if call.result.ndim == 3 else 1
    return count, 2 * call.result.numel() * call.args[-2].shape[-1]


def counted(step: Callable[[], None]) -> Count:
    """What a step does; it is not compiled, so that all operations are counted."""
    watch = Watch(note=lambda call: (collective(call), *products(call)), through=(DTensor,))
    with torch.compiler.set_stance("force_eager"), watch:
        step()
    sent = [found for found, *_ in watch.calls if found is not None]
    _, count, flops = zip(*watch.calls, strict=True)
    return Count(Counter(kind for kind, _ in sent), sum(its for _, its in sent), sum(count), sum(flops))


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
        """Set the gradient of every parameter."""
        fed = self._fed[self._at % len(self._fed)]
        for name, p in self.wrapped.model.named_parameters():
            p.grad = fed[name].clone()  # some packages write into it
        self._at += 1

    def step(self) -> None:
        """A step of the optimiser alone."""
        for optimizer in self._optimizers:
            optimizer.step()

    def count(self) -> Count:
        """What one more step does."""
        self.feed()
        return counted(self.step)


def stepped_weights(name: str, layout: Layout) -> dict[str, Tensor]:
    """Whole weights after a few steps in one process."""
    stepped = Stepped(name, small(layout.shapes), layout)
    for _ in range(STEPS):
        stepped.feed()
        stepped.step()
    return {key: local(p).clone() for key, p in stepped.wrapped.model.named_parameters()}


def squares_off(name: str, layout: Layout, expected: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """For each parameter that this rank has a part of: squares of the error, and of the whole update."""
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


def performed(compiled: bool, function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function, with torch.compile on or off."""
    torch.compiler.set_stance("default" if compiled else "force_eager")
    return function(*args)


# --------------------------------------------------------------------------------------- measured


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far weights are from those of one process, relative to the update."""

    whole: float
    worst: float  # of a parameter

    @property
    def good(self) -> bool:
        """Whether they are as near as the noise allows."""
        return self.whole <= AGREES and self.worst <= WORST_AGREES


class Comparison:
    """The packages, and what is known about them."""

    def __init__(self, path: Sequence[Path], *, compiled: bool, verbose: bool) -> None:
        self._path, self._compiled, self._verbose = path, compiled, verbose
        self._weights: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._agreements: dict[tuple[str, str], Agreement | WorkerError] = {}

    def agreement(self, name: str, layout: Layout) -> Agreement | WorkerError:
        """How near a layout comes to one process, or why it does not run."""
        key = name, layout.name
        if key not in self._agreements:
            try:
                self._agreements[key] = self._agreement(name, layout)
            except WorkerError as problem:
                self._agreements[key] = problem
        return self._agreements[key]

    def _agreement(self, name: str, layout: Layout) -> Agreement:
        if layout.ranks == 1:
            self._weights[name, layout.shapes] = self._run(layout, stepped_weights, name, layout)[0]
        elif (name, layout.shapes) not in self._weights:
            self._weights[name, layout.shapes] = self._alone(name, stepped_weights, layout.shapes)
        expected = self._weights[name, layout.shapes]
        every = self._run(layout, squares_off, name, layout, expected)
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
        every = self._run(layout, interleaved, names, layout, blocks, rounds, more=rounds * ROUND_LIMIT)
        slowest = {
            name: [max(ranks) for ranks in zip(*(times[name] for times, _ in every), strict=True)]
            for name in names
        }
        return slowest, {name: [counts[name] for _, counts in every] for name in names}

    def _run(self, layout: Layout, *task: Any, more: float = 0) -> list[Any]:
        """The results of a function on every rank of a layout."""
        limit = more + (COMPILED_LIMIT if self._compiled else LIMIT)
        given: dict[str, Any] = {"path": self._path, "verbose": self._verbose}
        return on_ranks(layout.ranks, performed, self._compiled, *task, limit=limit, **given)

    def _alone(self, name: str, function: Callable[..., Any], shapes: str, *args: Any) -> Any:
        """The result in one process or, for a package that takes no plain tensors, under FSDP2 on one."""
        plain, sharded = Layout(ALONE, shapes=shapes), Layout("FSDP2 1", {"fsdp": 1}, shapes)
        try:
            return self._run(plain, function, name, plain, *args)[0]
        except WorkerError:
            return self._run(sharded, function, name, sharded, *args)[0]


# ---------------------------------------------------------------------------------------- report

SAID = f"""\
All packages run with their own defaults: the matrices of the blocks under Muon, and embedding, head and
norms under the AdamW that each brings (torch's, for torch.optim.Muon). Gradients are given, the same in every
layout, so any difference is due to the optimiser.

- muonium: its kernel for `X Xᵀ`, which needs Triton and CUDA, is replaced by a matrix product. Its driver for
  single tensors runs, since the batched one needs CUDA.
- dion, muon-fsdp2 and muonium call `torch.compile`, which {{compiles}}.
- DDP: plain tensors with equal gradients in every process.
- TP: matrices cut by `ColwiseParallel` and `RowwiseParallel`, and plain tensors beside them.
- Ours starts from `d0={D0}`, which changes the size of updates, not their cost.
"""

LAYOUTS_SAID = f"""\
"Runs" is followed by the distance from the same package in one process (muon-fsdp2: FSDP2 on one), relative
to the update: of all weights and, in brackets, of the worst tensor. It is measured after {STEPS} steps of a
small model: two blocks of width 64, in one layout with stacks of {EXPERTS} experts; in the uneven one of
width 61, with a matrix of three rows. *Off* means above {AGREES:g}, or above {WORST_AGREES:g} for a tensor. A
package *refuses* a layout if its own code raises an error for it, and *crashes* with any other error.
"""

TIMES_SAID = f"""\
A model of width {WIDTH}, float32. A round is a step of every package, in rotating order; a step's time is
that of the slowest rank, from a barrier on. Ratios are taken within a round: the median of {{rounds}} rounds
and, in brackets, the range of the middle half of them.

"Sent" is what a rank sends in a step, on average and at most: 2n(S−1)/S in an all-reduce of n bytes over S
ranks, n(S−1)/S in an all-gather, a reduce-scatter or a broadcast of n bytes in all, and in all other
collectives what leaves the rank. "Matrices" are those that ranks orthogonalise in a step, counted once for
each rank that takes part, padding included. "Work" is that of matrix products, where one process does 1: of
all ranks together, and of the busiest."""


def kind(problem: WorkerError, package: Package) -> str:
    """What a package does instead of running."""
    refuses = "refuses" if package.home in problem.stated_in else "crashes"
    return {"missing": "is missing", "late": "hangs", "died": "crashes"}.get(problem.kind, refuses)


def layout_table(page: Page, comparison: Comparison, names: Sequence[str], layouts: Sequence[str]) -> None:
    """Print which layouts run, and the errors below."""
    notes: dict[str, int] = {}

    def cells(layout: str) -> Iterator[str]:
        yield layout
        for name in names:
            found = comparison.agreement(name, LAYOUTS[layout])
            if isinstance(found, WorkerError):
                number = notes.setdefault(found.said, len(notes) + 1)
                yield f"{kind(found, PACKAGES[name])} [{number}]"
            else:
                runs = "runs" if found.good else "runs, *off*"
                yield f"{runs} {short(found.whole)} ({short(found.worst)})"

    page.table(" | ".join(["", *names]), map(cells, layouts))
    page.tell("")
    for said, number in notes.items():
        code = said.replace("`", "'")
        page.tell(f"{number}. `{code}`")


TIMES_COLUMNS = """\
 | ms: | ÷ AdamW: | ÷ ours: | sent, MB: | at most: | collectives | matrices: | work: | busiest:"""


def tell_times(page: Page, comparison: Comparison, there: Sequence[str], timing: str, rounds: int) -> None:
    """Print times and counts in a layout, of the packages that run in it."""
    layout, blocks = LAYOUTS[TIMED[timing][0]], TIMED[timing][1]
    names = [name for name in there if not isinstance(comparison.agreement(name, layout), WorkerError)]
    parameters = list(large(blocks).named_parameters())
    matrices = sum(is_matrix(name, p) for name, p in parameters)
    page.tell(
        f"{blocks} blocks: {matrices} matrices and {len(parameters) - matrices} other tensors, "
        f"{sum(p.numel() for _, p in parameters) / 1e6:.2f} · 10⁶ parameters.\n"
    )
    try:
        times, counts = comparison.times(names, layout, blocks, rounds)
    except WorkerError as problem:
        page.tell(f"No times: {problem}")
        return

    def cells(name: str) -> list[str]:
        beside = (
            spread(ratios(times[name], times[base]), 0.25, 0.75) if base in times else "–"
            for base in (ADAMW, OURS)
        )
        work = ["–"] * 3
        alone = comparison.count_alone(name, blocks)
        if alone.products:
            done = matrices * sum(count.products for count in counts[name]) / alone.products
            flops = [count.flops / alone.flops for count in counts[name]]
            work = [f"{done:.0f}", f"{sum(flops):.2f}", f"{max(flops):.2f}"]
        sent = [count.sent / 1e6 for count in counts[name]]
        sizes = f"{sum(sent) / len(sent):.2f}", f"{max(sent):.2f}"
        return [name, milliseconds(times[name]), *beside, *sizes, collectives(counts[name]), *work]

    page.table(TIMES_COLUMNS, map(cells, names))


def collectives(counts: Sequence[Count]) -> str:
    """The collectives of a step: of each kind, those of the rank that takes part in most."""
    most: Counter[str] = Counter()
    for count in counts:
        most |= count.collectives
    return ", ".join(f"{number} {kind}" for kind, number in sorted(most.items())) or "none"


def main() -> None:
    """Measure, print, and write what was asked for."""
    cli = parser(__doc__)
    add = cli.add_argument
    add("--peers", type=Path, required=True, metavar="FOLDER", help="see above")
    add("--packages", nargs="+", choices=PACKAGES, default=list(PACKAGES), metavar="NAME")
    add("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    add("--timed", nargs="*", choices=TIMED, default=list(TIMED), metavar="NAME")
    add("--rounds", type=int, default=15)
    add("--compiled", action="store_true", help="compile what packages compile: many minutes more")
    add("--verbose", action="store_true", help="show what the processes print")
    add("--out", type=Path, metavar="FOLDER", help="for muon_peers.md")
    args = cli.parse_args()
    for variable in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ[variable] = "1"

    page = Page("Muon beside other packages", args.out, {args.peers: "FOLDER"})
    page.tell(
        f"torch {torch.__version__}, Python {platform.python_version()}; one to four processes of one thread "
        f"each over gloo, on {os.cpu_count()} cores of a CPU.\n",
        SAID.format(compiles="is on here" if args.compiled else "is off here; `--compiled` turns it on"),
    )
    there, path = [], [ROOT]

    def cells(name: str) -> list[str]:
        package = PACKAGES[name]
        told = "this repository" if name == OURS else torch.__version__
        try:
            if package.peer is not None:
                path.append(install(package.peer, args.peers.resolve()))
                told = package.peer.told
            there.append(name)
        except PeerError as failure:
            told = f"**{failure}**"
        return [name, told, package.newton_schulz]

    page.table(" | version | Newton–Schulz", map(cells, args.packages))
    comparison = Comparison(path, compiled=args.compiled, verbose=args.verbose)
    if args.layouts:
        page.tell(f"\n## Layouts\n\n{LAYOUTS_SAID}")
        layout_table(page, comparison, there, args.layouts)
    if args.timed:
        page.tell(f"\n## Times\n\n{TIMES_SAID.format(rounds=args.rounds)}")
    for timing in args.timed:
        page.tell(f"\n### {timing}\n")
        tell_times(page, comparison, there, timing, args.rounds)
    page.save("muon_peers.md")


if __name__ == "__main__":
    main()
