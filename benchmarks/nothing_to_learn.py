"""Random labels: does a step size that follows evidence run away where there is nothing to learn?

    PYTHONPATH=. python benchmarks/nothing_to_learn.py [--steps 20000] [--step-size balance prodigy]

A small network is trained on random inputs with new random labels at every step, so that the best it can do
is to predict nothing: the best loss is the entropy of the labels. Then it is trained on a fixed set with
random labels, which it can memorise. It prints the loss of the averaged weights, d and its evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from harness.tables import parser
from torch import Tensor, nn

from prodigyplus import ProdigyPlusScheduleFree

CLASSES, INPUTS, BATCH, FIXED = 10, 32, 16, 256
SHOWN = 8


def main() -> None:
    """Train, and print."""
    cli = parser(__doc__)
    cli.add_argument("--steps", type=int, default=20_000)
    cli.add_argument("--step-size", nargs="+", default=["balance", "prodigy"])
    args = cli.parse_args()
    torch.set_num_threads(1)
    print(f"the entropy of the labels is {math.log(CLASSES):.4f}")
    for task, make in (("drawn anew", anew), ("by heart", by_heart)):
        for step_size in args.step_size:
            run(task, make(), step_size, args.steps)


def anew() -> Callable[[int], tuple[Tensor, Tensor]]:
    """New inputs and labels for a step."""
    generator = torch.Generator().manual_seed(1)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        inputs = torch.rand(BATCH, INPUTS, generator=generator) - 0.5
        return inputs, torch.randint(CLASSES, (BATCH,), generator=generator)

    return batch


def by_heart() -> Callable[[int], tuple[Tensor, Tensor]]:
    """A batch of a fixed set."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(FIXED, INPUTS, generator=generator) - 0.5
    labels = torch.randint(CLASSES, (FIXED,), generator=generator)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(FIXED, (BATCH,), generator=generator)
        return inputs[chosen], labels[chosen]

    return batch


def run(task: str, batch: Callable[[int], tuple[Tensor, Tensor]], step_size: str, steps: int) -> None:
    """One run, which prints a line every so many steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = ProdigyPlusScheduleFree(model.parameters(), step_size=step_size)  # type: ignore[arg-type]
    shown = {round(steps * 2.0**-power) for power in range(SHOWN)}
    losses = []
    for step in range(1, steps + 1):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step in shown:
            with torch.no_grad(), optimizer.averaged_parameters():
                losses = [float(nn.functional.cross_entropy(model(x), y)) for x, y in map(batch, range(200))]
            numbers = optimizer.scalars()
            print(
                f"{task}, {step_size}, step {step}: loss {sum(losses) / len(losses):.4f}, "
                f"d {numbers['d']:.2e}, d_hat {numbers['d_hat']:.3g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
