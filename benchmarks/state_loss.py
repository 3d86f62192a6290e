"""What smaller state costs in loss: runs of gpt_fsdp2.py that differ in an option, over several seeds.

python benchmarks/state_loss.py [--option bfloat16_z=True] [--seeds 3] [--steps 600]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]


def held_out(seed: int, steps: int, options: list[str]) -> float:
    """Bits per byte on text that a run of one process of one thread has not seen, at its end."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        script = ["launch/gpt_fsdp2.py", "--seed", str(seed), "--steps", str(steps), "--out", folder]
        script += ["--option", "step_size=prodigy"]
        subprocess.run(
            [sys.executable, *launcher, *script, *(f"--option={option}" for option in options)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
        found: float = [line["bits_per_byte"] for line in lines if line["kind"] == "held out"][-1]
        return found


def main() -> None:
    """Run, and print a row for each seed, and how far they are apart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--option", default="bfloat16_z=True")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    runs = [(seed, options) for seed in range(1, args.seeds + 1) for options in ([], [args.option])]
    with ThreadPoolExecutor(2) as two:
        losses = list(two.map(lambda run: held_out(run[0], args.steps, run[1]), runs))
    print(f"| seed | the defaults | `{args.option}` | more |\n|---|--:|--:|--:|")
    plain, other = losses[::2], losses[1::2]
    more = [b - a for a, b in zip(plain, other, strict=True)]
    for (seed, _), a, b, difference in zip(runs[::2], plain, other, more, strict=True):
        print(f"| {seed} | {a:.4f} | {b:.4f} | {difference:+.4f} |")
    if args.seeds > 1:
        mean, error = statistics.mean(more), statistics.stdev(more) / math.sqrt(args.seeds)
        print(f"\nBits per byte after {args.steps} steps: {mean:+.4f} on average, with a standard error of")
        apart = statistics.stdev(plain)
        print(f"{error:.4f}; the seeds of the defaults are {apart:.4f} apart (standard deviation).")


if __name__ == "__main__":
    main()
