"""ρ, d and the loss over a run: with balance, and with step sizes that are held fixed.

    PYTHONPATH=. python benchmarks/balance_trace.py [--task NAME] [--held RATE ...] [--out docs]

A table of ρ by quarters of the run, and a chart. Held step sizes warm up over a 20th of the run, and ρ is
computed all the same; docs/research.md says what it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import charts
from harness.tables import head, parser, row
from quality.peers import trained
from quality.task import Setup
from quality.tasks import TASKS

from prodigyplus import ProdigyPlusScheduleFree

Trace = dict[str, list[float]]
SMOOTHED = 0.95  # weight of the past in the running mean of the training loss


def main() -> None:
    """Run, print, draw."""
    cli = parser(__doc__)
    cli.add_argument("--task", choices=TASKS, default="gpt-w64-b8")
    cli.add_argument("--held", type=float, nargs="*", default=[5e-4, 2e-3, 5e-3, 2e-2])
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()
    torch.set_num_threads(1)
    traces: dict[str, Trace] = {}
    quarters = "ρ, first quarter: | second: | third: | fourth:"
    print(head(f"step size | {quarters} | d at the end: | evaluated:"))
    for held in (None, *args.held):
        name = "balance" if held is None else f"{held:g}"
        traces[name], loss = run(args.task, held)
        rho, quarter = traces[name]["rho"], len(traces[name]["rho"]) // 4
        means = (sum(rho[i * quarter : (i + 1) * quarter]) / quarter for i in range(4))
        last = f"{traces[name]['d'][-1]:.2g}", f"{loss:.4f}"
        print(row(name, *(f"{mean:+.2f}" for mean in means), *last), flush=True)
    if args.out is not None:
        draw(traces, args.task, args.out / "balance_trace.png")


def run(task: str, held: float | None) -> tuple[Trace, float]:
    """What a run does at each step, and the loss at its end."""
    spec = TASKS[task]
    scale = spec.scales["small"]
    problem = spec.build(Setup(scale, 1, torch.device("cpu"), Path("runs/quality")))
    optimizer = ProdigyPlusScheduleFree(trained(problem.model), step_size="balance")
    group: dict[str, Any] = optimizer.param_groups[0]
    trace: Trace = {"rho": [], "d": [], "loss": []}
    for step in range(scale.steps):
        if held is not None:
            for name in ("d", "shared_d"):
                group[name].fill_(held * min(1.0, (step + 1) / (scale.steps / 20)))
        torch.manual_seed(step)
        problem.model.train()
        optimizer.zero_grad()
        loss = problem.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]
        trace["d"].append(float(group["d"]))
        optimizer.step()
        trace["rho"].append(float(group["d_hat"]))
        before = trace["loss"][-1] if step else loss.item()
        trace["loss"].append(SMOOTHED * before + (1 - SMOOTHED) * loss.item())
    problem.model.eval()
    with torch.no_grad(), optimizer.averaged_parameters():
        return trace, problem.evaluate().loss


def draw(traces: dict[str, Trace], task: str, path: Path) -> None:
    """Three panels over the steps."""
    figure, grid = charts.panels(3, 1, (7, 9), sharex=True)
    panels = grid[:, 0]
    labels = {
        "rho": "ρ, which balance leads to −¼",
        "d": "step size d",
        "loss": "training loss (lower is better)",
    }
    for panel, (name, label) in zip(panels, labels.items(), strict=True):
        for step_size, trace in traces.items():
            first = 20 if name == "rho" else 0
            steps = range(first, len(trace[name]))
            width = 2.2 if step_size == "balance" else 1.0
            panel.plot(steps, trace[name][first:], label=step_size, linewidth=width)
        panel.set_ylabel(label)
    panels[0].axhline(-0.25, color="gray", linestyle="--", linewidth=1)
    panels[0].set_ylim(-0.7, 1.5)
    panels[1].set_yscale("log")
    panels[0].set_title(f"{task}: balance, and step sizes held")
    panels[2].set_xlabel("step")
    charts.save(figure, path, below=panels[0].get_lines()[: len(traces)])


if __name__ == "__main__":
    main()
