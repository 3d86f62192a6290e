"""Make the states of published_cases.py: run the published package, save its state, and run on.

    pip install --no-deps --target ORACLE prodigy-plus-schedule-free==2.0.1
    python tests/golden/make_published.py 2.0.1 ORACLE
    pip install --no-deps --target OLDER prodigy-plus-schedule-free==1.9.0
    python tests/golden/make_published.py 1.9.0 OLDER

If names of cases follow, only these are made.

The package as it is published makes the state. The steps after that are made by 2.0.1 with make.py's
corrections, and by 1.9.0 as it is. They are repeated several times, as floors.py says, for the noise floor.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import sys
from typing import Any

import torch
from cases import Perturbation, Problem, distance
from floors import PERTURBATIONS, last_bits
from make import HERE, oracle
from published_cases import AFTER, EVERY, SAVED, SHAPES, Saved


def play(
    corrected: type[torch.optim.Optimizer], saved: Saved, perturbed: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is saved; and from the steps after it, d, the loss, and the weights after the first and the last.

    Args:
        corrected: The package with corrections; its base class is the package as published.
        saved: The case to play.
        perturbed: The seed of a perturbation of the steps after the save; None for none.
    """
    problem = Problem(saved.dtype, shapes=SHAPES)
    parameters = problem.parameters
    for number in saved.zero_at_first:
        parameters[number].data.zero_()
    optimizer: Any = corrected.__base__(saved.grouped(parameters), **saved.options)
    optimizer.train()

    def steps(count: int) -> None:
        for _ in range(count):
            problem.backward()
            for number in saved.without_gradient:
                parameters[number].grad = None
            optimizer.step()

    def weights() -> list[torch.Tensor]:
        return [p.detach().flatten()[::EVERY].clone() for p in parameters]

    steps(saved.before)
    getattr(optimizer, saved.mode)()
    state = copy.deepcopy({"optimizer": optimizer.state_dict(), "weights": [p.data for p in parameters]})
    optimizer.train()
    if saved.version == "2.0.1":
        optimizer.__class__ = corrected
    if perturbed is not None:
        problem.perturb(Perturbation(perturbed, last_bits(saved.options)))
    d, losses, first = [], [problem.loss()], []
    for step in range(AFTER):
        steps(1)
        d.append([group["d"] for group in optimizer.param_groups])
        if step == 0:
            first = weights()
        losses.append(problem.loss())
    numbers = {"d": torch.tensor(d, dtype=torch.float64), "loss": torch.tensor(losses)}
    return state, {**numbers, "first": first, "last": weights()}


def noise_floor(
    corrected: type[torch.optim.Optimizer], saved: Saved, unperturbed: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The largest distances of perturbed runs: in d at each step, and in the weights of any parameter."""
    floor = {"d": torch.zeros(AFTER), "first": torch.zeros(1), "last": torch.zeros(1)}
    for seed in range(PERTURBATIONS):
        _, run = play(corrected, saved, seed)
        off = {"d": (run["d"] / unperturbed["d"] - 1).abs().amax(dim=1)}
        for name in ("first", "last"):
            pairs = zip(run[name], unperturbed[name], strict=True)
            off[name] = torch.tensor([max(distance(a.float().numpy(), b.float().numpy()) for a, b in pairs)])
        floor = {name: torch.maximum(values, off[name].float()) for name, values in floor.items()}
    return floor


def made(corrected: type[torch.optim.Optimizer], saved: Saved) -> dict[str, Any]:
    state, run = play(corrected, saved)
    return {**state, **run, "floor": noise_floor(corrected, saved, run)}


def main() -> None:
    version, folder, *names = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints
        corrected = oracle(folder)
        for name, saved in SAVED.items():
            if saved.version == version and (not names or name in names):
                with gzip.GzipFile(HERE / f"published_{name}.pt.gz", "wb", mtime=0) as file:
                    torch.save(made(corrected, saved), file)


if __name__ == "__main__":
    main()
