"""How Prodigy's step size behaves in a group of Muon's: MNIST and the GPT with and without --muon.

python benchmarks/muon_d.py --out docs
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")

# Runs a script of launch/; if the first argument says so, the groups for Muon are trained without it.
WITHIN = """
import runpy, sys
sys.path.insert(0, "launch")
if sys.argv.pop(1) == "split":
    import optimizers
    groups_for_muon = optimizers.parameters
    optimizers.parameters = lambda *its: [g | {"use_muon_pp": False} for g in groups_for_muon(*its)]
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Name, whether to split only, options, and a colour.
ARMS: tuple[tuple[str, str, list[str], str], ...] = (
    ("one group, no Muon", "", [], "C7"),
    ("Muon's groups, no Muon", "split", ["--muon"], "C0"),
    ("Muon", "", ["--muon"], "C1"),
    ("Muon, split_groups=False", "", ["--muon", "--option", "split_groups=False"], "C2"),
)


class Task(NamedTuple):
    """A script to run, and where in its log what it comes to stands."""

    name: str
    script: str
    options: list[str]
    loss: str  # key of the training loss
    result: tuple[str, str]  # kind and key of what it is judged by
    unit: str


def records(task: Task, split: str, options: list[str]) -> list[dict[str, Any]]:
    """The log of a run on two processes."""
    with tempfile.TemporaryDirectory() as folder:
        script = [split, f"launch/{task.script}", "--out", folder, *task.options, *options]
        command = [sys.executable, *LAUNCHER, sys.executable, "-c", WITHIN, *script]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return list(map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines()))


def of_training(log: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """What stands under a key, over the steps."""
    return [(line["step"], line[key]) for line in log if line["kind"] == "train" and key in line]


def draw(axes: Axes, log: list[dict[str, Any]], key: str, label: str, style: str) -> None:
    """A curve over the steps."""
    axes.plot(*zip(*of_training(log, key), strict=True), style, label=label, linewidth=1.2)


def main() -> None:
    """Run, print what came out, and draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="of the GPT")
    parser.add_argument("--epochs", type=int, default=3, help="of MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, help="folder for muon_d.png")
    args = parser.parse_args()
    tasks = (
        Task(
            "MNIST", "mnist_ddp.py", ["--epochs", str(args.epochs)], "loss", ("test", "accuracy"), "accuracy"
        ),
        Task(
            "GPT",
            "gpt_fsdp2.py",
            ["--steps", str(args.steps), "--eval-every", str(args.steps)],
            "bits_per_byte",
            ("held out", "bits_per_byte"),
            "bits/byte",
        ),
    )
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, len(tasks), squeeze=False)
    print(
        "| task | seed | groups | result | d of the matrices | d of the others |\n|---|--:|---|--:|--:|--:|"
    )
    for column, task in enumerate(tasks):
        for seed in args.seeds:
            for name, split, options, colour in ARMS:
                log = records(task, split, ["--seed", str(seed), "--option", "step_size=prodigy", *options])
                kind, key = task.result
                result = [line[key] for line in log if line["kind"] == kind][-1]
                last = [line for line in log if line["kind"] == "train"][-1]
                others = last.get("d_1", last["d"])
                print(
                    f"| {task.name} | {seed} | {name} | {result:.4f} {task.unit} | {last['d']:.2e} "
                    f"| {others:.2e} |",
                    flush=True,
                )
                if seed != args.seeds[0]:
                    continue
                draw(grid[0, column], log, task.loss, name, colour)
                draw(grid[1, column], log, "d", name, colour)
                if others != last["d"]:
                    draw(grid[1, column], log, "d_1", f"{name}: the others", f"{colour}:")
        grid[0, column].set(title=f"{task.name}, seed {args.seeds[0]}", ylabel=f"training, {task.loss}")
        grid[1, column].set(xlabel="step", ylabel="d of the matrices, and of the others", yscale="log")
    grid[0, 0].set(yscale="log")
    for axes in grid.flat:
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    if args.out is not None:
        figure.savefig(args.out / "muon_d.png", dpi=120)


if __name__ == "__main__":
    main()
