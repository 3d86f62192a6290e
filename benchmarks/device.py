"""What a step costs on a GPU, compared with other optimisers: time, the host's share of it, launches, memory.

    python benchmarks/device.py --json device.json
    python benchmarks/device.py --host

The first needs a GPU, and takes a minute; optimisers of packages that are not installed are left out. The
second needs none: kernels are compiled but do not run, and the rest of a step is the host's work. Both
run from a checkout, with its folder in PYTHONPATH.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.no_gpu import pretend_gpu
from harness.peers import OURS, OURS_SHARDED, load
from harness.shapes import Shape, gpt, llama_1b
from harness.tables import head, parser, row
from harness.tensors import state_bytes, with_gradients
from harness.workers import simulated
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from prodigyplus.device import jit

STEPS, WARM_UP = 15, 50  # before, Python's caches and the allocator's still fill
HOST_STEPS = 200
RANKS = 8  # that shards are for

Make = Callable[[list[nn.Parameter]], Optimizer]

# Half matrices, half vectors: 2.1 M parameters.
SMALL: list[Shape] = [(64, 64), (64,)] * 500
# 400 adapters of rank 16 and width 1,280: 16.4 M parameters in 800 tensors.
LORA: list[Shape] = [(16, 1280), (1280, 16)] * 400


@dataclass
class Result:
    """What was measured for an optimiser."""

    case: str
    optimizer: str
    parameters: int
    tensors: int
    device_ms: float
    host_ms: float
    launches: int
    state_bytes: float  # per parameter, as is the next
    extra_bytes: float  # the peak of a step, above what stays


def made(place: str, **options: Any) -> Make | None:
    """A function that makes the optimiser at a place; None if its package is not installed."""
    try:
        kind = load(place)
    except ImportError:
        return None

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer: Optimizer = kind(parameters, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def cases() -> Iterator[tuple[str, list[Shape], torch.dtype, Mapping[str, Make | None]]]:
    """Every case: its name, shapes, dtype and optimisers; ratios are to the first of these."""
    published = "prodigyplus.prodigy_plus_schedulefree_2:ProdigyPlusScheduleFree"
    adamw = {"AdamW fused": made("torch.optim:AdamW", lr=1e-3, fused=True)}
    peers = {
        **adamw,
        "AdamW foreach": made("torch.optim:AdamW", lr=1e-3, foreach=True),
        "schedulefree": made("schedulefree:AdamWScheduleFree", lr=1e-3),
        "prodigyopt slice_p=11": made("prodigyopt:Prodigy", slice_p=11),
        "prodigy-plus": made(published),
    }
    kernels = {"ours": made(OURS), "ours, fused=False": made(OURS, fused=False)}
    with_z = {"ours, bfloat16_z": made(OURS, bfloat16_z=True)}
    gpt2 = gpt(width=768, layers=12, vocabulary=50257, context=1024)
    models: dict[str, tuple[list[Shape], dict[str, Make | None]]] = {
        "Llama-3.2-1B": (llama_1b(), with_z),
        "GPT-2": (gpt2, with_z),
        "1,000 small": (SMALL, {}),
    }
    for name, (shapes, more) in models.items():
        yield f"{name}, float32", shapes, torch.float32, {**peers, **kernels, **more}
        yield f"{name}, bfloat16", shapes, torch.bfloat16, {**adamw, **kernels}
    yield "LoRA, bfloat16", LORA, torch.bfloat16, {**adamw, **kernels}
    muons = {"torch Muon": made("torch.optim:Muon", lr=1e-3), "ours": made(OURS, use_muon_pp=True)}
    matrices: list[Shape] = [shape for shape in llama_1b()[1:] if len(shape) == 2]
    yield "Llama's matrices, Muon", matrices, torch.float32, muons


def measure(case: str, name: str, make: Make, shapes: Sequence[Shape], dtype: torch.dtype) -> Result:
    """Median times of the steps of one optimiser, on the GPU."""
    parameters = with_gradients(shapes, dtype, "cuda")
    optimizer = make(parameters)
    for _ in range(WARM_UP):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    device_ms, host_ms = [], []
    for _ in range(STEPS):
        start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began = time.perf_counter()
        start.record()
        optimizer.step()
        end.record()
        host_ms.append((time.perf_counter() - began) * 1e3)
        torch.cuda.synchronize()
        device_ms.append(start.elapsed_time(end))
    extra = torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    launches = sum(not name.startswith(("Memcpy", "Memset")) for name in names)
    count = sum(p.numel() for p in parameters)
    return Result(
        case=case,
        optimizer=name,
        parameters=count,
        tensors=len(parameters),
        device_ms=statistics.median(device_ms),
        host_ms=statistics.median(host_ms),
        launches=launches,
        state_bytes=state_bytes(optimizer) / count,
        extra_bytes=extra / count,
    )


def on_gpu(only: Sequence[str]) -> list[Result]:
    """Measure all cases, and print a line for each optimiser."""
    results: list[Result] = []
    for case, shapes, dtype, optimizers in cases():
        if not any(text in case for text in only):
            continue
        first: float | None = None
        for name, make in optimizers.items():
            if make is None:
                continue
            result = measure(case, name, make, shapes, dtype)
            torch.cuda.empty_cache()
            first = first or result.device_ms
            results.append(result)
            times = result.device_ms, result.device_ms / first, result.host_ms
            sizes = f"{result.state_bytes:.2f}", f"{result.extra_bytes:.2f}"
            print(row(case, name, *(f"{ms:.2f}" for ms in times), result.launches, *sizes), flush=True)
    return results


def small_tensors(count: int, mesh: DeviceMesh | None) -> list[nn.Parameter]:
    """That many tensors on the CPU, with gradients; on a mesh, this rank's rows of DTensors."""
    tensors = with_gradients([(32, 1), (1, 32), (1,), (2,)] * (count // 4))
    if mesh is None:
        return tensors

    def rows(local: Tensor) -> DTensor:
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    shards = [nn.Parameter(rows(p.detach())) for p in tensors]
    for shard, p in zip(shards, tensors, strict=True):
        assert p.grad is not None
        shard.grad = rows(p.grad)
    return shards


def host_ms(parameters: list[nn.Parameter], place: str, **options: Any) -> float:
    """The least time of a step: whatever else runs only adds to it."""
    optimizer = load(place)(parameters, **options)
    times = []
    for _ in range(WARM_UP + HOST_STEPS):
        began = time.perf_counter()
        optimizer.step()
        times.append((time.perf_counter() - began) * 1e3)
    return min(times[WARM_UP:])


def on_host() -> None:
    """The host's time by the number of tensors, with kernels that do not run; and that of AdamW."""
    torch.set_num_threads(1)
    pretend_gpu()
    real, launched = jit.launch, 0

    def launch(*arguments: Any, **constants: Any) -> None:
        nonlocal launched
        launched += 1
        real(*arguments, **constants)

    jit.launch = launch
    columns = "AdamW fused, ms: | AdamW foreach, ms: | ours, ms: | operator by operator, ms:"
    print(head(f"tensors: | which are | {columns} | launches of kernels:"))
    with simulated(RANKS):
        cut = init_device_mesh("cpu", (RANKS,))
        kinds = (("whole", None, OURS), (f"shards of {RANKS} ranks", cut, OURS_SHARDED))
        for (what, mesh, ours), count in itertools.product(kinds, (148, 1000)):
            make = partial(small_tensors, count, mesh)
            launched = 0
            fused = host_ms(make(), ours, fused=True)
            count_of_launches = launched // (WARM_UP + HOST_STEPS)
            adamw = [host_ms(make(), "torch.optim:AdamW", **{way: True}) for way in ("fused", "foreach")]
            plain = host_ms(make(), ours, fused=False)
            times = (f"{ms:.2f}" for ms in (*adamw, fused, plain))
            print(row(count, what, *times, count_of_launches), flush=True)


def main() -> None:
    """See the module."""
    cli = parser(__doc__)
    cli.add_argument("--host", action="store_true", help="without a GPU: the host's work alone")
    cli.add_argument(
        "--only", default=[""], nargs="+", metavar="TEXT", help="cases with one of these in their names"
    )
    cli.add_argument("--json", type=Path, metavar="FILE", help="where to write what was measured")
    args = cli.parse_args()
    if args.host:
        on_host()
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/device.py: there is no GPU here; --host measures what needs none.")
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, Python {sys.version.split()[0]}; {STEPS} steps\n")
    columns = "device, ms: | ÷ the first: | host, ms: | launches: | state, B: | extra, B:"
    print(head(f"case | optimiser | {columns}"), flush=True)
    results = on_gpu(args.only)
    if args.json:
        found = {"card": card, "torch": torch.__version__, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
