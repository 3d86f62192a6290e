"""What a step of the sharded optimiser costs on the parameters of large models, on up to 4,096 ranks.

    python benchmarks/scale.py [--models NAME ...] [--layouts NAME ...] [--ranks N ...] [--out FOLDER]

One process is rank 0, which has the largest shards, and then the last rank, which has the smallest, of a
process group that sends nothing (torch's fake one). It runs the optimiser's own step on shards without memory
(device "meta"), in float32, and counts what is sent and what state there is. Host times are those of a model
of as many tensors, each of a few elements, none of which are moved as one.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shapes import MODELS, Kind, Weight, parameter_count
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from prodigyplus.engine import driver
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

RANKS = (8, 64, 512, 4096)
TP = 8  # ranks of tensor parallelism
MOST_SHARDS = 64  # of HSDP
MOST_EP = 64  # ranks of expert parallelism; DeepSeek-V3 was trained with 64
BUCKET_MIB = 64  # the optimiser's default
HALF = 2  # bytes of a bfloat16, in which FSDP2 is taken to send everything

# What a rank of S in a ring sends of a tensor of n bytes, in units of n·(S−1)/S.
RING = {"allreduce_": 2}

ASSUMED = f"""\
State is of float32 parameters under the default options, on rank 0, which holds most; AdamW's is 8 bytes a
parameter. All-reduces are those of one step of the optimiser. Of mesh axes of more than one rank, `cut`
counts those that cut a parameter and `copy` those that only copy. `buckets` are those of {BUCKET_MIB} MiB
of local parameters if one holds them all, else of half as much, since two are under way at a time.
Bytes are what a rank sends in a ring: 2n(S-1)/S in an all-reduce of n bytes over S ranks,
n(S-1)/S in an all-gather or a reduce-scatter.

"FSDP2 sends" is the least that it can, for one microbatch a step: an all-gather in the forward pass, another
in the backward pass and a reduce-scatter of the gradients, all in bfloat16; with HSDP also an all-reduce of
the gradient's shards over the replicas. Gradients in float32, more microbatches and FSDP2's padding make the
share smaller. What tensor and expert parallelism send of activations is left out.

HSDP: groups of {MOST_SHARDS} shards, or of half the ranks. FSDP x TP: {TP} ranks of tensor parallelism; of
{TP} ranks in all, nothing is left for FSDP2 to send. FSDP + EP: the experts on a mesh of their own, FSDP2
along their second dimension x {MOST_EP} ranks of expert parallelism (or all); the rest under FSDP2 on all
ranks."""

# ------------------------------------------------------------------------------------ layouts

Placed = dict[Kind, tuple[DeviceMesh, tuple[Placement, ...]]]
"""Where weights of each kind lie. A mesh axis "fsdp" or "replica" is FSDP2's, another somebody else's."""


def fsdp(ranks: int) -> Placed:
    """FSDP2 over all ranks."""
    place = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",)), (Shard(0),)
    return {"column": place, "row": place, "vector": place}


def hsdp(ranks: int) -> Placed:
    """FSDP2 in groups, replicated."""
    shards = min(MOST_SHARDS, ranks // 2)
    mesh = init_device_mesh("cpu", (ranks // shards, shards), mesh_dim_names=("replica", "fsdp"))
    place = mesh, (Replicate(), Shard(0))
    return {"column": place, "row": place, "vector": place}


def fsdp_tp(ranks: int) -> Placed:
    """FSDP2 of what tensor parallelism has cut, as torch's ``parallelize_module`` and FSDP2 place it."""
    mesh = init_device_mesh("cpu", (ranks // TP, TP), mesh_dim_names=("fsdp", "tp"))
    return {
        "column": (mesh, (_StridedShard(0, split_factor=TP), Shard(0))),
        "row": (mesh, (Shard(0), Shard(1))),
        "vector": (mesh, (Shard(0), Replicate())),
    }


def fsdp_ep(ranks: int) -> Placed:
    """FSDP2 over all ranks, but experts on a mesh of expert parallelism x FSDP2."""
    ep = min(MOST_EP, ranks)
    mesh = init_device_mesh("cpu", (ranks // ep, ep), mesh_dim_names=("fsdp", "ep"))
    return {**fsdp(ranks), "expert": (mesh, (Shard(1), Shard(0)))}


LAYOUTS: dict[str, Callable[[int], Placed]] = {
    "FSDP2": fsdp,
    "HSDP": hsdp,
    "FSDP x TP": fsdp_tp,
    "FSDP + EP": fsdp_ep,
}


def layouts_of(weights: Iterable[Weight]) -> list[str]:
    """The layouts that a model is measured in."""
    return ["FSDP2", "HSDP", "FSDP x TP"] if all(w.kind != "expert" for w in weights) else ["FSDP + EP"]


# --------------------------------------------------------------------------------- simulation


@contextmanager
def simulated(ranks: int, rank: int = 0) -> Iterator[None]:
    """A process group in which this process is one rank, and the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # It would put this group's meshes in the place of equal ones of the next.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that are called, and notes every collective: name, bytes, and how many ranks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self.collectives: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if func.namespace in ("c10d", "_c10d_functional"):
            group = dist.ProcessGroup.unbox(args[1])
            self.collectives.append((func.overloadpacket.__name__, sum(map(nbytes, args[0])), group.size()))
        return func(*args, **(kwargs or {}))

    @property
    def sent(self) -> float:
        """The bytes that a rank sends in all collectives."""
        return sum(RING[name] * size * (ranks - 1) / ranks for name, size, ranks in self.collectives)


def parameters_of(weights: Sequence[Weight], placed: Placed, device: str) -> list[nn.Parameter]:
    """The pieces of the weights that this rank has, with gradients."""

    def piece(weight: Weight) -> DTensor:
        mesh, placements = placed[weight.kind]
        shape = torch.Size(weight.shape)
        local, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
        stride = torch.empty(shape, device="meta").stride()
        values = torch.ones(local, device=device)
        return DTensor.from_local(values, mesh, placements, run_check=False, shape=shape, stride=stride)

    parameters = []
    for weight in weights:
        p = nn.Parameter(piece(weight))
        p.grad = piece(weight)
        parameters.append(p)
    return parameters


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def nbytes(tensor: Tensor) -> int:
    """The bytes of a tensor without storage."""
    return tensor.numel() * tensor.element_size()


# -------------------------------------------------------------------------------- measurements


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step costs rank 0, and what it holds."""

    model: str
    layout: str
    ranks: int
    mesh: str
    collectives: int
    cut: int
    copy: int
    buckets: int
    sent: float
    fsdp_sent: float
    state: int
    held: int
    agreed: bool  # whether the last rank makes the same all-reduces, of the same sizes

    @property
    def share(self) -> float:
        """The optimiser's bytes as a share of FSDP2's own, which may send nothing."""
        return self.sent / self.fsdp_sent if self.fsdp_sent else math.nan

    @property
    def bounded(self) -> bool:
        """Whether there are at most two all-reduces along an axis that cuts, and one for each further bucket.

        Along an axis that only copies there is one, by which the copies agree on whether the step happens.
        """
        return self.collectives <= self.cut * (1 + self.buckets) + self.copy


def cost(model: str, layout: str, ranks: int) -> Cost:
    """Run one step on shards without memory, and count."""
    weights = list(MODELS[model].weights())
    with simulated(ranks):
        placed = LAYOUTS[layout](ranks)
        parameters = parameters_of(weights, placed, "meta")
        watch, optimizer = watched_step(parameters)
        meshes = dict.fromkeys(mesh for mesh, _ in placed.values())
        axes = {(mesh, axis) for mesh in meshes for axis, size in enumerate(mesh.shape) if size > 1}
        cutting = {axis for p in parameters for axis in cutting_axes(p.data)}
        measured = Cost(
            model=model,
            layout=layout,
            ranks=ranks,
            mesh=", ".join(" x ".join(map(str, mesh.shape)) for mesh in meshes),
            collectives=len(watch.collectives),
            cut=len(cutting),
            copy=len(axes - cutting),
            buckets=bucket_count(parameters),
            sent=watch.sent,
            fsdp_sent=sum(fsdp_sends(p.data) for p in parameters),
            state=state_bytes(optimizer),
            held=sum(local(p).numel() for p in parameters),
            agreed=True,
        )
        shapes = [local(p).shape for p in parameters]
    with simulated(ranks, rank=ranks - 1):
        parameters = parameters_of(weights, LAYOUTS[layout](ranks), "meta")
        if [local(p).shape for p in parameters] == shapes:  # the same step, then
            return measured
        return replace(measured, agreed=watched_step(parameters)[0].collectives == watch.collectives)


def watched_step(parameters: Sequence[nn.Parameter]) -> tuple[Watch, torch.optim.Optimizer]:
    """The first step of an optimiser of these parameters."""
    optimizer = ShardedProdigyPlusScheduleFree(parameters, bucket_bytes=BUCKET_MIB << 20)
    with Watch() as watch:
        optimizer.step()
    return watch, optimizer


def cutting_axes(p: Tensor) -> Iterator[tuple[DeviceMesh, int]]:
    """The mesh axes that cut a parameter into more pieces than one."""
    assert isinstance(p, DTensor)
    for axis, placement in enumerate(p.placements):
        if not placement.is_replicate() and p.device_mesh.size(axis) > 1:
            yield p.device_mesh, axis


def bucket_count(parameters: Iterable[Tensor]) -> int:
    """How many halves of a bucket the parameters fill, from the last to the first; 1 if one holds all."""
    sizes = [nbytes(local(p)) for p in parameters][::-1]
    whole = BUCKET_MIB << 20
    limit = whole if sum(sizes) <= whole else whole // 2
    count, filled = 1, 0
    for size in sizes:
        if filled and filled + size > limit:
            count, filled = count + 1, 0
        filled += size
    return count


def fsdp_sends(p: Tensor) -> float:
    """The bytes that a rank sends for FSDP2 of one parameter in one step; see ``ASSUMED``."""
    assert isinstance(p, DTensor)
    names = p.device_mesh.mesh_dim_names
    assert names is not None
    sizes = dict(zip(names, p.device_mesh.shape, strict=True))
    shards, replicas = sizes["fsdp"], sizes.get("replica", 1)
    cut_by_others = math.prod(sizes[names[axis]] for _, axis in cutting_axes(p) if names[axis] != "fsdp")
    gathered = HALF * p.numel() / cut_by_others
    return 3 * gathered * (shards - 1) / shards + 2 * gathered / shards * (replicas - 1) / replicas


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of state that this rank holds."""
    return sum(nbytes(local(value)) for state in optimizer.state.values() for value in state.values())


@dataclass(frozen=True, slots=True)
class Host:
    """What one step costs the host."""

    model: str
    layout: str
    tensors: int
    ratio: float
    operations: int
    adamw_operations: int


def host(model: str, layout: str, steps: int, ranks: int = 512, size: int = 64) -> Host:
    """Time steps on a model of as many tensors, but of ``size`` in every dimension.

    The shards are too small to take time, and AdamW has the same ones, as plain tensors. On "meta" the time
    would be that of torch's inference of shapes.
    """
    weights = [weight._replace(shape=(size,) * len(weight.shape)) for weight in MODELS[model].weights()]
    # Those of the model are too large to be moved as one.
    with simulated(ranks), mock.patch.object(driver, "SMALL", -1):
        parameters = parameters_of(weights, LAYOUTS[layout](ranks), "cpu")
        plain = [nn.Parameter(local(p).clone()) for p in parameters]
        for p in plain:
            p.grad = torch.ones_like(p)
        optimizers = ShardedProdigyPlusScheduleFree(parameters), torch.optim.AdamW(plain, foreach=True)
        operations = []
        for optimizer in optimizers:
            optimizer.step()  # makes the state
            with Watch() as watch:
                optimizer.step()
            operations.append(watch.operations)
        times = [[seconds(optimizer.step) for optimizer in optimizers] for _ in range(steps)]
    own, adamw = (statistics.median(column) for column in zip(*times, strict=True))
    return Host(model, layout, len(weights), own / adamw, *operations)


def seconds(function: Callable[[], object]) -> float:
    """The processor time of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


# -------------------------------------------------------------------------------------- report

COST_HEAD = """\
| model | layout | ranks | mesh | cut | copy | buckets | all-reduces \
| optimiser sends, MB | FSDP2 sends, MB | share | state, GB | parameters held, 10⁶ | state, bytes each |
|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""

HOST_HEAD = """\
| model | layout | tensors | host time / AdamW's | operations per tensor | AdamW's |
|---|---|--:|--:|--:|--:|"""


def cost_row(c: Cost) -> str:
    """A line of the table of costs."""
    share = "–" if math.isnan(c.share) else f"{c.share:.4%}"
    return (
        f"| {c.model} | {c.layout} | {c.ranks:,} | {c.mesh} | {c.cut} | {c.copy} | {c.buckets:,} "
        f"| {c.collectives:,} | {c.sent / 1e6:,.2f} | {c.fsdp_sent / 1e6:,.0f} | {share} "
        f"| {c.state / 1e9:,.3f} | {c.held / 1e6:,.1f} | {c.state / c.held:.2f} |"
    )


def host_row(h: Host) -> str:
    """A line of the table of host times."""
    return (
        f"| {h.model} | {h.layout} | {h.tensors:,} | {h.ratio:.0f} | {h.operations / h.tensors:.0f} "
        f"| {h.adamw_operations / h.tensors:.1f} |"
    )


def verdicts(costs: Sequence[Cost]) -> Iterator[str]:
    """Whether the costs are within their bounds."""
    yield (
        "- At most two all-reduces along each mesh axis that cuts a parameter, one for each further bucket, "
        "and one along each axis that only copies, whatever the number of parameters and ranks: "
        f"{holds(costs, lambda c: c.bounded)}."
    )
    yield (
        "- The last rank, where it has smaller shards, makes the same all-reduces of the same sizes as rank "
        f"0: {holds(costs, lambda c: c.agreed)}."
    )
    for c in costs:
        if (c.model, c.layout, c.ranks) == ("Llama-3-70B", "FSDP2", 4096):
            yield (
                "- Of Llama-3-70B on 4,096 ranks under FSDP2 at most 0.5 % of FSDP2's own bytes: "
                f"{'holds' if c.share <= 0.005 else 'does not hold'}, {c.share:.4%}."
            )


def holds(costs: Sequence[Cost], test: Callable[[Cost], bool]) -> str:
    """Whether all pass a test, or which do not."""
    failing = [f"{c.model}, {c.layout}, {c.ranks:,} ranks" for c in costs if not test(c)]
    return f"does not hold for {'; '.join(failing)}" if failing else "holds"


# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = dict(zip(MODELS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
STYLES = dict(zip(LAYOUTS, ("o-", "s--", "^-.", "D-"), strict=True))


def draw(costs: Sequence[Cost], path: Path) -> None:
    """Two panels over the ranks: the share of FSDP2's bytes, and the bytes of state."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve(left, costs, lambda c: 100 * c.share)
    left.axhline(0.5, color="black", linewidth=1, linestyle=":")
    left.text(0.03, 0.47, "0.5 %, what is allowed", va="top", transform=left.get_yaxis_transform())
    left.set(title="What the optimiser sends in a step", ylabel="% of what FSDP2 sends", ylim=(1e-3, 1))
    curve(right, costs, lambda c: c.state / 1e9)
    right.set(title="State of the optimiser, float32 parameters", ylabel="GB per rank")
    ranks = sorted({c.ranks for c in costs})
    models, layouts = {c.model for c in costs}, {c.layout for c in costs}
    for axes in (left, right):
        axes.set(xlabel="ranks", xscale="log", yscale="log")
        axes.set_xticks(ranks, [f"{r:,}" for r in ranks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles = [
        *(left.plot([], [], color=COLOURS[m], linewidth=3, label=m)[0] for m in COLOURS if m in models),
        *(left.plot([], [], STYLES[n], color="0.3", label=n)[0] for n in STYLES if n in layouts),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def curve(axes: Axes, costs: Sequence[Cost], value: Callable[[Cost], float]) -> None:
    """A curve over the ranks for each model and layout."""
    for model, layout in dict.fromkeys((c.model, c.layout) for c in costs):
        points = [(c.ranks, value(c)) for c in costs if (c.model, c.layout) == (model, layout)]
        axes.plot(
            *zip(*points, strict=True), STYLES[layout], color=COLOURS[model], linewidth=1.5, markersize=5
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=RANKS, metavar="N")
    parser.add_argument("--steps", type=int, default=7, help="how many are timed; 0 leaves host times out")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for scale.md and scale.png")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)

    lines: list[str] = []

    def tell(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    tell("# Cost at scale, simulated\n")
    tell(f"    {shlex.join(['python', 'benchmarks/scale.py', *arguments])}\n")
    if args.out is not None:
        tell("![What the optimiser sends and holds, over the number of ranks](scale.png)\n")
    tell(f"{ASSUMED}\n")
    weights = {model: list(MODELS[model].weights()) for model in args.models}
    chosen = [
        (model, layout)
        for model in weights
        for layout in layouts_of(weights[model])
        if layout in args.layouts
    ]
    for model, its in weights.items():
        tell(f"- {model}: {parameter_count(its) / 1e9:,.2f} · 10⁹ parameters in {len(its):,} tensors")
    tell(f"\n{COST_HEAD}")
    costs = []
    for model, layout in chosen:
        for ranks in args.ranks:
            costs.append(cost(model, layout, ranks))
            tell(cost_row(costs[-1]))
    tell("")
    for verdict in verdicts(costs):
        tell(verdict)
    if args.steps:
        tell(
            f"\nProcessor time of the host, the median of {args.steps} steps, in turn with "
            f"AdamW(foreach=True)\non the same shards as plain tensors:\n\n{HOST_HEAD}"
        )
        for model, layout in chosen:
            tell(host_row(host(model, layout, args.steps)))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "scale.md").write_text("\n".join(lines) + "\n")
        draw(costs, args.out / "scale.png")


if __name__ == "__main__":
    main()
