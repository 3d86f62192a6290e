"""The curves of the guides: what d and the loss do in a healthy run, and where something is wrong.

    python benchmarks/pictures.py --out docs/pictures [--only NAME ...]

Real runs of small networks on the CPU. For each picture it prints a table of where its runs end, and writes
NAME.png if --out is given.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import constraints
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prodigyplus import ProdigyPlusScheduleFree

SMOOTHED = 0.95  # weight of the past in the running mean of the training loss
INPUTS, CLASSES = 32, 10
BALANCE: dict[str, Any] = {"step_size": "balance"}


class Run(NamedTuple):
    """What a run did: d and the smoothed training loss after each step; at its end, the average's loss."""

    d: list[float]
    loss: list[float]
    evaluated: float


class Task(NamedTuple):
    """Something to learn.

    Args:
        model: What is trained.
        loss: The model's loss on a batch that the generator draws.
        parameters: What is passed to the optimiser.
        after_step: Called after each step.
        evaluation: The batch size of the evaluation.
    """

    model: nn.Module
    loss: Callable[[torch.Generator, int], Tensor]
    parameters: list[nn.Parameter]
    after_step: Callable[[], None] = lambda: None
    evaluation: int = 4096


def train(task: Task, steps: int, batch: int = 64, constrain: Any = None, **options: Any) -> Run:
    """Train, with new batches in each step."""
    optimizer = ProdigyPlusScheduleFree(task.parameters, **options)
    if constrain:
        optimizer.constrain(*constrain)
    draws, d, losses = torch.Generator().manual_seed(1), list[float](), list[float]()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(draws, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        task.after_step()
        d.append(optimizer.scalars()["d"])
        before = losses[-1] if losses else loss.item()
        losses.append(SMOOTHED * before + (1 - SMOOTHED) * loss.item())
    with torch.no_grad(), optimizer.averaged_parameters():
        evaluated = task.loss(torch.Generator().manual_seed(2), task.evaluation).item()
    return Run(d, losses, evaluated)


def layers(*widths: int) -> nn.Sequential:
    """A multilayer perceptron."""
    pairs = itertools.pairwise(widths)
    *its, _ = (layer for pair in pairs for layer in (nn.Linear(*pair), nn.GELU()))
    return nn.Sequential(*its)


def classes(dtype: torch.dtype = torch.float32) -> Task:
    """Predict which output of a random network is largest, from its input; each batch is new."""
    torch.manual_seed(0)
    teacher, model = layers(INPUTS, 16, CLASSES), layers(INPUTS, 128, 128, CLASSES).to(dtype)

    def loss(draws: torch.Generator, batch: int) -> Tensor:
        x = 2 * torch.randn(batch, INPUTS, generator=draws)
        with torch.no_grad():
            labels = teacher(x).argmax(1)
        return cross_entropy(model(x.to(dtype)).float(), labels)

    return Task(model, loss, list(model.parameters()))


def rows(*, by_hand: bool) -> tuple[Task, Any]:
    """The task of benchmarks/constraints.py with rows of norm 1, and the constraint that keeps them there."""
    its = constraints.rows()

    def project() -> None:
        with torch.no_grad():
            its.project(its.held)

    def loss(draws: torch.Generator, batch: int) -> Tensor:
        return its.loss(None)

    parameters = list(its.model.parameters())
    if by_hand:
        return Task(its.model, loss, parameters, project), None
    return Task(its.model, loss, parameters), (its.held, its.project)


def healthy() -> dict[str, Run]:
    """Runs with nothing wrong."""
    return {
        'step_size="balance"': train(classes(), 600, **BALANCE),
        'step_size="prodigy"': train(classes(), 600),
    }


def stays() -> dict[str, Run]:
    """Runs whose d stays at d0, and one whose d does not."""
    bfloat16 = torch.bfloat16
    return {
        "Prodigy, lr=1": train(classes(), 600),
        "Prodigy, lr=1e-3": train(classes(), 600, lr=1e-3),
        "Prodigy, bfloat16 rounded to nearest": train(classes(bfloat16), 600, stochastic_rounding=False),
    }


def runs_away() -> dict[str, Run]:
    """Weights that are changed after each step, and the same as a constraint."""
    found = {}
    for name, by_hand in (
        ("rows renormalised after each step", True),
        ("optimizer.constrain(rows, …)", False),
    ):
        task, constraint = rows(by_hand=by_hand)
        found[name] = train(task, 600, constrain=constraint)
    return found


def batch_size() -> dict[str, Run]:
    """One task with small and large batches."""
    return {
        f"{name}, batch {batch}": train(classes(), 600, batch, **options)
        for name, options in (("balance", BALANCE), ("Prodigy", {}))
        for batch in (4, 64, 512)
    }


PICTURES = {
    "healthy": healthy,
    "stays": stays,
    "runs_away": runs_away,
    "batch_size": batch_size,
}


def draw(runs: dict[str, Run], path: Path) -> None:
    """Plot d and the loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.9), layout="constrained")
    step_size, loss = figure.subplots(1, 2)
    for number, (name, run) in enumerate(runs.items()):
        step_size.plot(run.d, color=f"C{number}")
        label = f"{name} (loss of the average: {run.evaluated:.3g})"
        loss.plot(run.loss, color=f"C{number}", label=label)
    step_size.set(title="step size d", xlabel="step", yscale="log")
    loss.set(title="training loss (lower is better)", xlabel="step", yscale="log")
    for axes in (step_size, loss):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def table(name: str, runs: dict[str, Run]) -> Iterable[str]:
    """Where the runs end."""
    yield f"| {name} | d after 100 steps | d at the end | training loss | loss of the average |"
    yield "|---|--:|--:|--:|--:|"
    for label, run in runs.items():
        yield f"| {label} | {run.d[99]:.1e} | {run.d[-1]:.1e} | {run.loss[-1]:.3g} | {run.evaluated:.3g} |"


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        runs = PICTURES[name]()
        print("\n".join(table(name, runs)), end="\n\n", flush=True)
        if args.out is not None:
            draw(runs, args.out / f"{name}.png")


if __name__ == "__main__":
    main()
