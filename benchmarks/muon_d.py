"""How Prodigy's step size behaves in a Muon group: MNIST and the GPT with and without --muon.

python benchmarks/muon_d.py --out docs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from harness import charts
from harness.tables import head, parser, row
from harness.workers import log_of

# Runs a script of launch/ with the groups made for Muon, but trains them without it.
SPLIT = """
import runpy, sys
sys.path.insert(0, "launch")
import optimizers
groups_for_muon = optimizers.parameters
optimizers.parameters = lambda *its: [g | {"use_muon_pp": False} for g in groups_for_muon(*its)]
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# With Prodigy's own default: groups move by the mean of their step sizes.
MUON = ["--muon", "--option", "split_groups_mean=True"]

# Name, what runs the script, options, and a colour.
ARMS: tuple[tuple[str, str, list[str], str], ...] = (
    ("one group, no Muon", "", [], "C7"),
    ("Muon's groups, no Muon", SPLIT, MUON, "C0"),
    ("Muon", "", MUON, "C1"),
    ("Muon, split_groups=False", "", ["--muon", "--option", "split_groups=False"], "C2"),
)


class Task(NamedTuple):
    """A script to run, and where in its log the result is."""

    name: str
    script: str
    options: list[str]
    loss: str  # key of the training loss
    result: tuple[str, str]  # kind and key of its final measure
    unit: str


def main() -> None:
    """Run, print the results, and draw them."""
    cli = parser(__doc__)
    cli.add_argument("--steps", type=int, default=600, help="of the GPT")
    cli.add_argument("--epochs", type=int, default=3, help="of MNIST")
    cli.add_argument("--seeds", type=int, nargs="+", default=[1])
    cli.add_argument("--out", type=Path, help="folder for muon_d.png")
    args = cli.parse_args()
    epochs = ["--epochs", str(args.epochs)]
    steps = ["--steps", str(args.steps), "--eval-every", str(args.steps)]
    bits = "bits_per_byte"
    tasks = (
        Task("MNIST", "mnist_ddp.py", epochs, "loss", ("test", "accuracy"), "accuracy"),
        Task("GPT", "gpt_fsdp2.py", steps, bits, ("held out", bits), "bits/byte"),
    )
    figure, grid = charts.panels(2, len(tasks), (10, 7))
    print(head("task | seed: | groups | result: | d of the matrices: | d of the others:"))
    for column, task in enumerate(tasks):
        upper, lower = grid[:, column]
        for seed in args.seeds:
            for name, within, options, colour in ARMS:
                given = [*task.options, "--seed", str(seed), "--option", "step_size=prodigy", *options]
                log = log_of(task.script, 2, *given, within=within)
                kind, key = task.result
                result = [line[key] for line in log if line["kind"] == kind][-1]
                train = [line for line in log if line["kind"] == "train"]
                # With Muon there are two groups: its matrices, and the others.
                of_matrices, of_others = ("d/0", "d/1") if "d/0" in train[-1] else ("d", "d")
                d, others = train[-1][of_matrices], train[-1][of_others]
                cells = f"{result:.4f} {task.unit}", f"{d:.2e}", f"{others:.2e}"
                print(row(task.name, seed, name, *cells), flush=True)
                if seed == args.seeds[0]:
                    draw(upper, train, task.loss, name, colour)
                    draw(lower, train, of_matrices, name, colour)
                    if others != d:
                        draw(lower, train, of_others, f"{name}: the others", f"{colour}:")
        upper.set(title=f"{task.name}, seed {args.seeds[0]}", ylabel=f"training, {task.loss}")
        lower.set(xlabel="step", ylabel="d of the matrices, and of the others", yscale="log")
    grid[0, 0].set(yscale="log")
    if args.out is not None:
        charts.save(figure, args.out / "muon_d.png")


def draw(axes: Any, log: list[dict[str, Any]], key: str, label: str, style: str) -> None:
    """A curve over the steps."""
    points = [(line["step"], line[key]) for line in log if key in line]
    axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2)


if __name__ == "__main__":
    main()
