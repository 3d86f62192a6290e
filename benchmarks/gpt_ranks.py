"""The loss of one run of gpt_fsdp2.py on several numbers of ranks: curves that should lie on one another.

python benchmarks/gpt_ranks.py --out docs
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]


def losses(ranks: int, options: list[str]) -> list[float]:
    """The training loss in bits per byte of every step, on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        script = ["launch/gpt_fsdp2.py", "--log-every", "1", "--out", folder, *options]
        subprocess.run([sys.executable, *launcher, *script], cwd=ROOT, check=True, capture_output=True)
        lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
        return [line["bits_per_byte"] for line in lines if line["kind"] == "train"]


def main() -> None:
    """Run, print how far the curves are apart, and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--optimizers", nargs="+", default=["prodigyplus", "adamw"])
    parser.add_argument("--out", type=Path, help="folder for gpt_ranks.png")
    args = parser.parse_args()

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    (curves, apart) = figure.subplots(1, 2)
    print("| optimizer | ranks | last loss, bits/byte | furthest from one rank |\n|---|---|---|---|")
    for optimizer in args.optimizers:
        first: list[float] = []
        for number, ranks in enumerate(args.ranks):
            run = losses(ranks, ["--steps", str(args.steps), "--optimizer", optimizer])
            first = first or run
            off = [abs(a / b - 1) for a, b in zip(run, first, strict=True)]
            print(f"| {optimizer} | {ranks} | {run[-1]:.4f} | {max(off):.1e} |", flush=True)
            if optimizer == args.optimizers[0]:
                curves.plot(
                    run,
                    label=f"{ranks} ranks",
                    linewidth=3.5 - number,
                    linestyle=("-", "--", ":")[number % 3],
                )
            if number:
                apart.plot(off, label=f"{optimizer}, {ranks} ranks", linewidth=1)
    curves.set(title=f"training loss, {args.optimizers[0]}", xlabel="step", ylabel="bits per byte")
    apart.set(
        title=f"relative distance from {args.ranks[0]} rank", xlabel="step", yscale="log", ylim=(1e-8, 1e-4)
    )
    for axes in (curves, apart):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    if args.out is not None:
        figure.savefig(args.out / "gpt_ranks.png", dpi=120)


if __name__ == "__main__":
    main()
