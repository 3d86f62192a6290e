"""What smaller state costs in loss: runs of gpt_fsdp2.py that differ in an option, over several seeds.

python benchmarks/state_loss.py [--option bfloat16_z=True] [--seeds 3] [--steps 600]
"""

from __future__ import annotations

import math
import os
import statistics
from concurrent.futures import ThreadPoolExecutor

from harness.tables import head, parser, row
from harness.workers import log_of


def held_out(seed: int, steps: int, options: list[str]) -> float:
    """Bits per byte on held-out text at the end of a run in one process."""
    given = ["--seed", str(seed), "--steps", str(steps), "--option", "step_size=prodigy"]
    log = log_of("gpt_fsdp2.py", 1, *given, *(f"--option={option}" for option in options))
    found: float = [line["bits_per_byte"] for line in log if line["kind"] == "held out"][-1]
    return found


def main() -> None:
    """Run, and print a row for each seed, and how far they are apart."""
    cli = parser(__doc__)
    cli.add_argument("--option", default="bfloat16_z=True")
    cli.add_argument("--seeds", type=int, default=3)
    cli.add_argument("--steps", type=int, default=600)
    args = cli.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for each of the two that run at once
    seeds = range(1, args.seeds + 1)
    with ThreadPoolExecutor(2) as two:
        plain, other = (
            list(two.map(lambda seed, its=its: held_out(seed, args.steps, its), seeds))
            for its in ([], [args.option])
        )
    print(head(f"seed | the defaults: | `{args.option}`: | more:"))
    more = [b - a for a, b in zip(plain, other, strict=True)]
    for seed, a, b, difference in zip(seeds, plain, other, more, strict=True):
        print(row(seed, f"{a:.4f}", f"{b:.4f}", f"{difference:+.4f}"))
    if args.seeds > 1:
        mean, error = statistics.mean(more), statistics.stdev(more) / math.sqrt(args.seeds)
        print(f"\nBits per byte after {args.steps} steps: {mean:+.4f} on average, with a standard error of")
        apart = statistics.stdev(plain)
        print(f"{error:.4f}; the seeds of the defaults are {apart:.4f} apart (standard deviation).")


if __name__ == "__main__":
    main()
