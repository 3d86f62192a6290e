"""The curves of the guides: what d and the loss do in a healthy run, and in runs that something is wrong with.

    python benchmarks/pictures.py --out docs/pictures [--only NAME ...]

Real runs of small networks on the CPU. For each picture it prints a table of where its runs end, and writes
NAME.png if --out is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

from prodigyplus import ProdigyPlusScheduleFree

SMOOTHED = 0.95  # what is kept of the training loss from step to step
INPUTS, CLASSES = 32, 10
BALANCE = {"step_size": "balance"}


class Run(NamedTuple):
    """What a run did: after each step d of each group, and the smoothed training loss; the average's loss."""

    d: list[list[float]]
    loss: list[float]
    evaluated: float


class Task(NamedTuple):
    """Something to learn.

    Args:
        model: What is trained.
        loss: Of a batch that the generator draws, for the model.
        groups: The optimiser's parameters.
        after_step: Called after each step.
        evaluation: The batch size of the evaluation.
    """

    model: nn.Module
    loss: Callable[[torch.Generator, int], Tensor]
    groups: list[Any]
    after_step: Callable[[], None] = lambda: None
    evaluation: int = 4096


def train(task: Task, steps: int, batch: int = 64, constrain: Any = None, **options: Any) -> Run:
    """Train, with new batches in each step."""
    optimizer = ProdigyPlusScheduleFree(task.groups, **options)
    if constrain:
        optimizer.constrain(*constrain)
    draws, d, losses = torch.Generator().manual_seed(1), [], list[float]()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(draws, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        task.after_step()
        d.append([float(group["d"]) for group in optimizer.metrics()])
        before = losses[-1] if losses else loss.item()
        losses.append(SMOOTHED * before + (1 - SMOOTHED) * loss.item())
    with torch.no_grad(), optimizer.averaged_parameters():
        evaluated = task.loss(torch.Generator().manual_seed(2), task.evaluation).item()
    return Run(d, losses, evaluated)


def layers(*widths: int) -> nn.Sequential:
    """A multilayer perceptron."""
    pairs = list(zip(widths, widths[1:], strict=False))
    return nn.Sequential(*(layer for pair in pairs for layer in (nn.Linear(*pair), nn.GELU())))[:-1]


def classes(dtype: torch.dtype = torch.float32) -> Task:
    """The largest output of a random network, to be told from its input: batches are drawn anew."""
    torch.manual_seed(0)
    teacher, model = layers(INPUTS, 16, CLASSES), layers(INPUTS, 128, 128, CLASSES).to(dtype)

    def loss(draws: torch.Generator, batch: int) -> Tensor:
        x = 2 * torch.randn(batch, INPUTS, generator=draws)
        with torch.no_grad():
            labels = teacher(x).argmax(1)
        return cross_entropy(model(x.to(dtype)).float(), labels)

    return Task(model, loss, list(model.parameters()))


def rows(*, by_hand: bool) -> tuple[Task, Any]:
    """The same classes by cosines: rows of the last layer have norm 1; and the constraint that says so."""
    torch.manual_seed(0)
    teacher = layers(INPUTS, 16, CLASSES)
    model, last = layers(INPUTS, 128, 128, 32), nn.Linear(32, CLASSES, bias=False)
    with torch.no_grad():
        last.weight.copy_(normalize(last.weight))

    def loss(draws: torch.Generator, batch: int) -> Tensor:
        x = 2 * torch.randn(batch, INPUTS, generator=draws)
        with torch.no_grad():
            labels = teacher(x).argmax(1)
        return cross_entropy(16 * last(normalize(model(x))), labels)

    def renormalize() -> None:
        with torch.no_grad():
            last.weight.copy_(normalize(last.weight))

    parameters = [*model.parameters(), *last.parameters()]
    both = nn.ModuleList([model, last])
    if by_hand:
        return Task(both, loss, parameters, renormalize), None
    return Task(both, loss, parameters), (last.weight, normalize)


def two_networks() -> Task:
    """Two networks of one optimiser, in a group each: the second's weights have to come a hundred times as far."""
    torch.manual_seed(0)
    teachers = [layers(INPUTS, 16, 1) for _ in range(2)]
    models = nn.ModuleList(layers(INPUTS, 64, 1) for _ in range(2))
    scales = nn.ParameterList([nn.Parameter(torch.ones(INPUTS)), nn.Parameter(torch.ones(INPUTS))])
    units = (1.0, 0.01)

    def loss(draws: torch.Generator, batch: int) -> Tensor:
        x = torch.randn(batch, INPUTS, generator=draws)
        found = [model(x * scale * unit) for model, scale, unit in zip(models, scales, units, strict=True)]
        with torch.no_grad():
            wanted = [teacher(x) for teacher in teachers]
        return sum((mse_loss(a, b) for a, b in zip(found, wanted, strict=True)), torch.zeros(()))

    groups = [{"params": [*m.parameters(), s]} for m, s in zip(models, scales, strict=True)]
    return Task(nn.ModuleList([*models, scales]), loss, groups)


def healthy() -> dict[str, Run]:
    """Runs with nothing wrong."""
    return {
        'step_size="balance"': train(classes(), 600, **BALANCE),
        'step_size="prodigy"': train(classes(), 600),
    }


def stays() -> dict[str, Run]:
    """Runs whose d stays at d0, beside one whose d does not."""
    bfloat16 = torch.bfloat16
    return {
        "Prodigy, lr=1": train(classes(), 600),
        "Prodigy, lr=1e-3": train(classes(), 600, lr=1e-3),
        "Prodigy, bfloat16 rounded to nearest": train(classes(bfloat16), 600, stochastic_rounding=False),
    }


def runs_away() -> dict[str, Run]:
    """Weights that are changed after each step, and the same as a constraint."""
    found = {}
    for name, by_hand in (("rows renormalised after each step", True), ("optimizer.constrain(rows, …)", False)):
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


def networks() -> dict[str, Run]:
    """Two networks that need unlike step sizes, by what groups may share."""
    ways = {
        "a mean (the default)": {},
        "one d: split_groups=False": {"split_groups": False},
        "each its own: split_groups_mean=False": {"split_groups_mean": False},
    }
    return {name: train(two_networks(), 600, **options) for name, options in ways.items()}


PICTURES = {
    "healthy": healthy,
    "stays": stays,
    "runs_away": runs_away,
    "batch_size": batch_size,
    "networks": networks,
}


def draw(runs: dict[str, Run], path: Path) -> None:
    """d and the loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    step_size, loss = figure.subplots(1, 2)
    for number, (name, run) in enumerate(runs.items()):
        for group, values in enumerate(zip(*run.d, strict=True)):
            style = {"color": f"C{number}", "linestyle": ("-", "--")[group]}
            label = f"{name}" + (f", network {group + 1}" if len(run.d[0]) > 1 else "")
            step_size.plot(values, label=label, **style)
        loss.plot(run.loss, color=f"C{number}", label=f"{name}: average {run.evaluated:.3g}")
    step_size.set(title="step size d", xlabel="step", yscale="log")
    loss.set(title="training loss (lower is better)", xlabel="step", yscale="log")
    for axes in (step_size, loss):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def table(name: str, runs: dict[str, Run]) -> Iterable[str]:
    """Where the runs end."""
    yield f"| {name} | d after 100 steps | d at the end | training loss | loss of the average |"
    yield "|---|--:|--:|--:|--:|"
    for label, run in runs.items():
        early, last = (", ".join(f"{d:.1e}" for d in run.d[at]) for at in (99, -1))
        yield f"| {label} | {early} | {last} | {run.loss[-1]:.3g} | {run.evaluated:.3g} |"


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
