"""What a step costs on a GPU: time, the host's share of it, launches and memory, beside other optimisers.

    python benchmarks/device.py --json device.json
    python benchmarks/device.py --host

The first needs a GPU, and takes a few minutes; optimisers of packages that are not installed are left out.
The second needs none: kernels are not launched, and what is left of a step is the host's work. Both run from
a checkout, with its folder in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS, WARM_UP = 15, 4

Shapes = list[tuple[int, ...]]
Make = Callable[[list[nn.Parameter]], Optimizer]


def llama_1b() -> Shapes:
    """The shapes of Llama-3.2-1B: 1,236 M parameters in 146 tensors."""
    block: Shapes = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048)]
    block += [(2048, 8192), (2048,), (2048,)]
    return [(128256, 2048), *(block * 16), (2048,)]


def gpt2() -> Shapes:
    """The shapes of GPT-2: 124 M parameters in 148 tensors."""
    block: Shapes = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    block += [(768,)] * 4
    return [(50257, 768), (1024, 768), *(block * 12), (768,), (768,)]


def small() -> Shapes:
    """A thousand small tensors, 2.1 M parameters: half matrices, half vectors."""
    return [(64, 64), (64,)] * 500


def lora() -> Shapes:
    """400 adapters of rank 16 and width 1,280: 16.4 M parameters in 800 tensors."""
    return [(16, 1280), (1280, 16)] * 400


def matrices() -> Shapes:
    """What of Llama-3.2-1B Muon moves."""
    return [shape for shape in llama_1b()[1:] if len(shape) == 2]


@dataclass
class Result:
    """What was measured of an optimiser."""

    case: str
    optimizer: str
    parameters: int
    tensors: int
    device_ms: float
    host_ms: float
    launches: int
    state_bytes: float  # for each parameter, as the next
    extra_bytes: float  # the peak of a step, above what stays


def ours(**options: Any) -> Make:
    """Our optimiser."""
    from prodigyplus import ProdigyPlusScheduleFree

    return lambda parameters: ProdigyPlusScheduleFree(parameters, **options)


def peer(module: str, name: str, **options: Any) -> Make | None:
    """The optimiser of another package; None if it is not installed."""
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer: Optimizer = kind(parameters, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def peers() -> dict[str, Make | None]:
    """The optimisers that ours is measured beside; the first is what ratios are to."""
    return {
        "AdamW fused": functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
        "AdamW foreach": functools.partial(torch.optim.AdamW, lr=1e-3, foreach=True),
        "schedulefree": peer("schedulefree", "AdamWScheduleFree", lr=1e-3),
        "prodigyopt slice_p=11": peer("prodigyopt", "Prodigy", slice_p=11),
        "prodigy-plus": peer("prodigyplus.prodigy_plus_schedulefree_2", "ProdigyPlusScheduleFree"),
    }


def cases() -> Iterator[tuple[str, Shapes, torch.dtype, dict[str, Make | None]]]:
    """Every case: its name, shapes, dtype and optimisers."""
    fp32, bf16 = torch.float32, torch.bfloat16
    kernels: dict[str, Make | None] = {"ours": ours(), "ours, fused=False": ours(fused=False)}
    with_z: dict[str, Make | None] = {"ours, bfloat16_z": ours(bfloat16_z=True)}
    adamw: dict[str, Make | None] = {"AdamW fused": peers()["AdamW fused"]}
    yield "Llama-3.2-1B, float32", llama_1b(), fp32, {**peers(), **kernels, **with_z}
    yield "Llama-3.2-1B, bfloat16", llama_1b(), bf16, {**adamw, **kernels}
    yield "GPT-2, float32", gpt2(), fp32, {**peers(), **kernels, **with_z}
    yield "GPT-2, bfloat16", gpt2(), bf16, {**adamw, **kernels}
    yield "1,000 small, float32", small(), fp32, {**peers(), **kernels}
    yield "1,000 small, bfloat16", small(), bf16, {**adamw, **kernels}
    yield "LoRA, bfloat16", lora(), bf16, {**adamw, **kernels}
    muon = functools.partial(torch.optim.Muon, lr=1e-3)
    yield "Llama's matrices, Muon", matrices(), fp32, {"torch Muon": muon, "ours": ours(use_muon_pp=True)}


def problem(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Parameters with gradients."""
    parameters = [nn.Parameter(torch.randn(shape, device=device).mul_(0.02).to(dtype)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of the state of all parameters."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    )


def measure(case: str, name: str, make: Make, shapes: Shapes, dtype: torch.dtype) -> Result:
    """Steps of one optimiser, on the GPU: medians of their times."""
    parameters = problem(shapes, dtype, "cuda")
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
    launches = sum(event.count for event in profile.key_averages() if "Memcpy" not in event.key)
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


def on_gpu(only: str) -> list[Result]:
    """All cases, a line printed for each optimiser."""
    results: list[Result] = []
    for case, shapes, dtype, optimizers in cases():
        if only not in case:
            continue
        first: float | None = None
        for name, make in optimizers.items():
            if make is None:
                continue
            result = measure(case, name, make, shapes, dtype)
            torch.cuda.empty_cache()
            first = first or result.device_ms
            results.append(result)
            print(
                f"| {case} | {name} | {result.device_ms:.2f} | {result.device_ms / first:.2f} | "
                f"{result.host_ms:.2f} | {result.launches} | {result.state_bytes:.2f} | "
                f"{result.extra_bytes:.2f} |",
                flush=True,
            )
    return results


def host_ms(make: Make, count: int) -> float:
    """The median time of a step of ``count`` tensors of one element each, on the CPU."""
    parameters = problem([(32, 1), (1, 32), (1,), (2,)] * (count // 4), torch.float32, "cpu")
    optimizer = make(parameters)
    times = []
    for _ in range(WARM_UP + 4 * STEPS):
        began = time.perf_counter()
        optimizer.step()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[WARM_UP:])


def on_host() -> None:
    """The host's time by the number of tensors: of kernels that are not launched, and of AdamW fused."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from prodigyplus.device import launches

    print("| tensors | AdamW fused, ms | ours, ms | operator by operator, ms | launches |")
    print("|--:|--:|--:|--:|--:|")
    for count in (148, 1000):
        launched: list[object] = []
        # No mock in its place: what that does at a call takes longer than a launch.
        with mock.patch.object(launches, "launch", lambda kernel, *_, **__: launched.append(kernel)):  # noqa: B023
            fused = host_ms(ours(fused=True), count)
        count_of_launches = len(launched) // (WARM_UP + 4 * STEPS)
        adamw = host_ms(functools.partial(torch.optim.AdamW, fused=True), count)
        plain = host_ms(ours(fused=False), count)
        print(f"| {count} | {adamw:.2f} | {fused:.2f} | {plain:.2f} | {count_of_launches} |", flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--host", action="store_true", help="without a GPU: the host's work alone")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose names have this in them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was measured")
    args = parser.parse_args()
    if args.host:
        on_host()
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/device.py: there is no GPU here; --host measures what needs none.")
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, Python {sys.version.split()[0]}; {STEPS} steps\n")
    print("| case | optimiser | device, ms | ÷ the first | host, ms | launches | state, B | extra, B |")
    print("|---|---|--:|--:|--:|--:|--:|--:|", flush=True)
    results = on_gpu(args.only)
    if args.json:
        found = {"card": card, "torch": torch.__version__, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
