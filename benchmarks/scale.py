"""What a step of the sharded optimiser costs on the parameters of large models, on up to 4,096 ranks.

    python benchmarks/scale.py [--models NAME ...] [--layouts NAME ...] [--ranks N ...] [--out FOLDER]

One process is rank 0, which has the largest shards, and then the last rank, which has the smallest, of a
process group that sends nothing (torch's fake one). It runs the optimiser's own step on shards without memory
(device "meta"), in float32, and counts what is sent and what state there is. Host times are those of a model
of as many tensors, each of a few elements, none of which are moved as one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from harness import charts
from harness.shapes import MODELS, Kind, Weight, numel
from harness.tables import Page, parser
from harness.tensors import local, nbytes, state_bytes
from harness.watching import Watch, collective
from harness.workers import simulated
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from prodigyplus.engine import driver
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

RANKS = (8, 64, 512, 4096)
TP = 8  # ranks of tensor parallelism
MOST_SHARDS = 64  # in HSDP
MOST_EP = 64  # ranks of expert parallelism; DeepSeek-V3 was trained with 64
BUCKET_MIB = 64  # the optimiser's default
HALF = 2  # bytes of a bfloat16; FSDP2 is assumed to send everything in it

ASSUMED = f"""\
State is of float32 parameters under the default options, on rank 0, which holds most; AdamW's is 8 bytes a
parameter. All-reduces are those of one step of the optimiser. Of the mesh axes of more than one rank, `cut`
is how many shard some parameter, and `copy` how many only replicate. A bucket holds {BUCKET_MIB} MiB if all
local parameters fit into one, and otherwise {BUCKET_MIB // 2} MiB, since two are in flight at a time. Bytes
are what a rank sends in a ring: 2n(S-1)/S in an all-reduce of n bytes over S ranks, n(S-1)/S in an
all-gather or a reduce-scatter.

"FSDP2 sends" is the least that it can send, for one microbatch a step: an all-gather in the forward pass,
another in the backward pass and a reduce-scatter of the gradients, all in bfloat16; with HSDP also an
all-reduce of the gradient's shards over the replicas. Gradients in float32, more microbatches and FSDP2's
padding make the share smaller. Activations that tensor and expert parallelism send are left out.

HSDP: groups of {MOST_SHARDS} shards, or of half the ranks. FSDP x TP: {TP} ranks of tensor parallelism; with
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
    """FSDP2 after tensor parallelism, as torch's ``parallelize_module`` and FSDP2 place parameters."""
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
        collectives, optimizer = watched_step(parameters)
        meshes = dict.fromkeys(mesh for mesh, _ in placed.values())
        axes = {(mesh, axis) for mesh in meshes for axis, size in enumerate(mesh.shape) if size > 1}
        cutting = {axis for p in parameters for axis in cutting_axes(p.data)}
        measured = Cost(
            model=model,
            layout=layout,
            ranks=ranks,
            mesh=", ".join(" x ".join(map(str, mesh.shape)) for mesh in meshes),
            collectives=len(collectives),
            cut=len(cutting),
            copy=len(axes - cutting),
            buckets=bucket_count(parameters),
            sent=sum(sent for _, sent in collectives),
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
        return replace(measured, agreed=watched_step(parameters)[0] == collectives)


def watched_step(
    parameters: Sequence[nn.Parameter],
) -> tuple[list[tuple[str, float]], torch.optim.Optimizer]:
    """The collectives of the first step of an optimiser of these parameters, and the optimiser."""
    optimizer = ShardedProdigyPlusScheduleFree(parameters, bucket_bytes=BUCKET_MIB << 20)
    with Watch(note=collective) as watch:
        optimizer.step()
    return [call for call in watch.calls if call is not None], optimizer


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
    """Time steps on a model with as many tensors, but with ``size`` in every dimension.

    The shards are too small to take time, and AdamW has the same ones, as plain tensors. On "meta" the time
    would be that of torch's inference of shapes.
    """
    weights = [weight._replace(shape=(size,) * len(weight.shape)) for weight in MODELS[model].weights()]
    # The model's own tensors are too large to be moved as one.
    with simulated(ranks), mock.patch.object(driver, "SMALL", -1):
        parameters = parameters_of(weights, LAYOUTS[layout](ranks), "cpu")
        plain = [nn.Parameter(local(p).clone()) for p in parameters]
        for p in plain:
            p.grad = torch.ones_like(p)
        optimizers = ShardedProdigyPlusScheduleFree(parameters), torch.optim.AdamW(plain, foreach=True)
        operations = []
        for optimizer in optimizers:
            optimizer.step()  # makes the state
            with Watch(note=bool) as watch:
                optimizer.step()
            operations.append(len(watch.calls))
        times = [[seconds(optimizer.step) for optimizer in optimizers] for _ in range(steps)]
    own, adamw = (statistics.median(column) for column in zip(*times, strict=True))
    return Host(model, layout, len(weights), own / adamw, *operations)


def seconds(function: Callable[[], object]) -> float:
    """The processor time of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


# -------------------------------------------------------------------------------------- report

COST_COLUMNS = """\
model | layout | ranks: | mesh | cut: | copy: | buckets: | all-reduces: | optimiser sends, MB: \
| FSDP2 sends, MB: | share: | state, GB: | parameters held, 10⁶: | state, bytes each:"""

HOST_COLUMNS = "model | layout | tensors: | host time / AdamW's: | operations per tensor: | AdamW's:"


def cost_row(c: Cost) -> list[object]:
    """A line of the table of costs."""
    share = "–" if math.isnan(c.share) else f"{c.share:.4%}"
    counts = [f"{c.ranks:,}", c.mesh, c.cut, c.copy, f"{c.buckets:,}", f"{c.collectives:,}"]
    sent = [f"{c.sent / 1e6:,.2f}", f"{c.fsdp_sent / 1e6:,.0f}", share]
    held = [f"{c.state / 1e9:,.3f}", f"{c.held / 1e6:,.1f}", f"{c.state / c.held:.2f}"]
    return [c.model, c.layout, *counts, *sent, *held]


def host_row(h: Host) -> list[object]:
    """A line of the table of host times."""
    operations = f"{h.operations / h.tensors:.0f}", f"{h.adamw_operations / h.tensors:.1f}"
    return [h.model, h.layout, f"{h.tensors:,}", f"{h.ratio:.0f}", *operations]


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
                "- For Llama-3-70B on 4,096 ranks under FSDP2 at most 0.5 % of FSDP2's own bytes: "
                f"{'holds' if c.share <= 0.005 else 'does not hold'}, {c.share:.4%}."
            )


def holds(costs: Sequence[Cost], test: Callable[[Cost], bool]) -> str:
    """Whether all pass a test, or which do not."""
    failing = [f"{c.model}, {c.layout}, {c.ranks:,} ranks" for c in costs if not test(c)]
    return f"does not hold for {'; '.join(failing)}" if failing else "holds"


COLOURS = dict(zip(MODELS, (charts.BLUE, charts.RED, charts.GREEN, charts.PINK), strict=True))
STYLES = dict(zip(LAYOUTS, ("o-", "s--", "^-.", "D-"), strict=True))


def draw(costs: Sequence[Cost], path: Path) -> None:
    """Two panels over the ranks: the share of FSDP2's bytes, and the bytes of state."""
    figure, [(left, right)] = charts.panels(1, 2, (11, 5.2))
    left.axhline(0.5, color="black", linewidth=1, linestyle=":")
    left.text(0.03, 0.47, "0.5 %, what is allowed", va="top", transform=left.get_yaxis_transform())
    left.set(title="What the optimiser sends in a step", ylabel="% of what FSDP2 sends", ylim=(1e-3, 1))
    right.set(title="State of the optimiser, float32 parameters", ylabel="GB per rank")
    curves = dict.fromkeys((c.model, c.layout) for c in costs)
    for axes in (left, right):
        for model, layout in curves:
            its = [c for c in costs if (c.model, c.layout) == (model, layout)]
            values = [100 * c.share if axes is left else c.state / 1e9 for c in its]
            style = {"color": COLOURS[model], "linewidth": 1.5, "markersize": 5}
            axes.plot([c.ranks for c in its], values, STYLES[layout], **style)
        axes.set_yscale("log")
        charts.over_ranks(axes, (c.ranks for c in costs))
    models, layouts = (
        [name for name in names if any(name in curve for curve in curves)] for names in (COLOURS, STYLES)
    )
    handles = [
        *(left.plot([], [], color=COLOURS[m], linewidth=3, label=m)[0] for m in models),
        *(left.plot([], [], STYLES[n], color="0.3", label=n)[0] for n in layouts),
    ]
    charts.save(figure, path, below=handles)


def main() -> None:
    """Measure, print, and write what was asked for."""
    cli = parser(__doc__)
    cli.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    cli.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    cli.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=RANKS, metavar="N")
    cli.add_argument("--steps", type=int, default=7, help="how many are timed; 0 leaves host times out")
    cli.add_argument("--out", type=Path, metavar="FOLDER", help="for scale.md and scale.png")
    args = cli.parse_args()
    torch.set_num_threads(1)

    page = Page("Cost at scale, simulated", args.out)
    if args.out is not None:
        page.tell("![What the optimiser sends and holds, over the number of ranks](scale.png)\n")
    page.tell(f"{ASSUMED}\n")
    chosen = []
    for model in args.models:
        weights = list(MODELS[model].weights())
        count = numel(weight.shape for weight in weights)
        page.tell(f"- {model}: {count / 1e9:,.2f} · 10⁹ parameters in {len(weights):,} tensors")
        chosen += [(model, layout) for layout in layouts_of(weights) if layout in args.layouts]
    page.tell("")
    costs: list[Cost] = []

    def cost_rows() -> Iterator[list[object]]:
        for model, layout in chosen:
            for ranks in args.ranks:
                costs.append(cost(model, layout, ranks))
                yield cost_row(costs[-1])

    page.table(COST_COLUMNS, cost_rows())
    page.tell("", *verdicts(costs))
    if args.steps:
        page.tell(
            f"\nProcessor time of the host, the median of {args.steps} steps, alternating with "
            "AdamW(foreach=True)\non the same shards as plain tensors; operator by operator, as on a CPU "
            "(performance.md has\nthe kernels' host time):\n"
        )
        page.table(HOST_COLUMNS, (host_row(host(model, layout, args.steps)) for model, layout in chosen))
    if args.out is not None:
        page.save("scale.md")
        draw(costs, args.out / "scale.png")


if __name__ == "__main__":
    main()
