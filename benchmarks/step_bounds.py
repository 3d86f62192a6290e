"""What a compiled step's time consists of, and what memory traffic alone would take: on the CPU.

    python benchmarks/step_bounds.py [--rounds N]

In one process, in turn: a step of AdamW fused, which does nothing but read and write its 28 bytes per
parameter; a step of ours, compiled, with a clock around its stages; and one with as many tiny tensors, which
is the host's share. What a stage reads from memory and writes there is known: each of these tensors fits into
the cache, and is read again from there.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType

import torch
from harness import machine
from harness.shapes import gpt
from harness.tables import head, parser, row
from harness.tensors import with_gradients

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.engine import compiled, driver
from prodigyplus.formulas import moments

ADAMW_BYTES = 28  # g, and p, exp_avg and exp_avg_sq read and written
SQUARES, PASSES, REST = "sums of g²", "samples of g and z, and the two passes", "the rest"
# Bytes per parameter, from memory and to it. Samples are an eleventh, but of every line of the cache.
BYTES = {SQUARES: 4, PASSES: 20, REST: 0}
TINY = 32  # rows and columns of the tensors that show the host's share


class Clock:
    """Seconds spent in functions, by the names of their stages."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def watch(self, module: ModuleType, function: Callable[..., object], stage: str) -> None:
        """Count the time of a function of this module from now on."""

        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[stage] += time.perf_counter() - start
            return result

        setattr(module, function.__name__, timed)

    def step(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """The milliseconds of a step by stage; the remainder is in :data:`REST`."""
        time.sleep(machine.PAUSE)
        self.seconds.clear()
        start = time.perf_counter()
        optimizer.step()
        rest = time.perf_counter() - start - sum(self.seconds.values())
        return {stage: 1000 * seconds for stage, seconds in (*self.seconds.items(), (REST, rest))}


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each stage."""
    return {stage: statistics.median(each[stage] for each in rounds) for stage in rounds[0]}


def main() -> None:
    """Measure and print."""
    cli = parser(__doc__)
    cli.add_argument("--rounds", type=int, default=30)
    rounds = cli.parse_args().rounds
    torch.set_num_threads(machine.THREADS)
    torch.manual_seed(0)
    machine.keep_freed_memory()

    whole = gpt()
    large = [shape for shape in whole if torch.Size(shape).numel() > driver.SMALL]
    stacks = {*whole} - {*large}
    tiny = [(TINY * (number + 1), TINY) for number in range(len(large) + len(stacks))]  # no two alike
    clock = Clock()
    optimizers = {
        "ours": ProdigyPlusScheduleFree(with_gradients(whole), compile=True),
        "tiny": ProdigyPlusScheduleFree(with_gradients(tiny), compile=True),
        "fused": torch.optim.AdamW(with_gradients(whole), fused=True),
    }
    for optimizer in optimizers.values():
        for _ in range(3):
            optimizer.step()
    clock.watch(moments, moments.squares, SQUARES)
    clock.watch(compiled, compiled.measure_and_move_, PASSES)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            seen[name].append(clock.step(optimizer))
    ours, host, fused = (medians(seen[name]) for name in optimizers)

    print(f"{machine.described()}; {rounds} rounds.\n")
    print(f"AdamW fused: {fused[REST]:.1f} ms for {ADAMW_BYTES} bytes per parameter.\n")
    columns = "bytes per parameter: | ms for these: | measured, less the host's ms: | the host's ms:"
    print(head(f"stage | {columns}"))
    rows: dict[str, tuple[float, ...]] = {
        stage: (float(count), fused[REST] * count / ADAMW_BYTES, ours[stage] - host[stage], host[stage])
        for stage, count in BYTES.items()
    }
    rows["all"] = tuple(map(sum, zip(*rows.values(), strict=True)))
    for stage, (count, *figures) in rows.items():
        print(row(stage, f"{count:.0f}", *(f"{figure:.1f}" for figure in figures)))


if __name__ == "__main__":
    main()
