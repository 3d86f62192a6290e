"""Make the states of published_cases.py: play them with the published package, save, and play on.

    pip install --no-deps --target ORACLE prodigy-plus-schedule-free==2.0.1
    python tests/golden/make_published.py 2.0.1 ORACLE
    pip install --no-deps --target OLDER prodigy-plus-schedule-free==1.9.0
    python tests/golden/make_published.py 1.9.0 OLDER

The package as it is published saves; what 2.0.1 then plays on is corrected as make.py says.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import sys
from typing import Any

import torch
from cases import Problem
from make import HERE, oracle
from published_cases import AFTER, EVERY, SAVED, SHAPES, Saved


def play(corrected: type[torch.optim.Optimizer], saved: Saved) -> dict[str, Any]:
    """What is saved; d and the loss of the steps that follow, and the weights after the first and last."""
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
    result = copy.deepcopy({"optimizer": optimizer.state_dict(), "weights": [p.data for p in parameters]})
    optimizer.train()
    if saved.version == "2.0.1":
        optimizer.__class__ = corrected
    d, losses = [], [problem.loss()]
    for step in range(AFTER):
        steps(1)
        d.append([group["d"] for group in optimizer.param_groups])
        if step == 0:
            result["first"] = weights()
        losses.append(problem.loss())
    numbers = {"d": torch.tensor(d, dtype=torch.float64), "loss": torch.tensor(losses)}
    return {**result, **numbers, "last": weights()}


def main() -> None:
    version, folder = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints
        corrected = oracle(folder)
        for name, saved in SAVED.items():
            if saved.version == version:
                with gzip.GzipFile(HERE / f"published_{name}.pt.gz", "wb", mtime=0) as file:
                    torch.save(play(corrected, saved), file)


if __name__ == "__main__":
    main()
