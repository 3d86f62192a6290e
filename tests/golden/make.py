"""Make the golden runs: play cases.py with the published packages, and keep what came of it.

    pip install --no-deps --target ORACLE prodigy-plus-schedule-free==2.0.1
    pip install --no-deps --target ANCESTOR prodigyopt==1.1.2
    pip install --no-deps --target SCHEDULEFREE schedulefree==1.4.1
    python tests/golden/make.py ORACLE ANCESTOR SCHEDULEFREE

The first, the oracle, has our import name, so it runs in a process without us. It is corrected in the places
where we differ on purpose and the numbers would show it:

- the row factor of tall tensors is normalised by its true mean;
- ‖s‖₁ of a tensor is summed in float32. The package rounds it to bfloat16, the dtype that s is stored in,
  which puts up to 0.4 % on a tensor's share of d's denominator, and turns a last bit of a gradient into
  as much where it tips the rounding;
- OrthoGrad leaves tensors of one element alone;
- without Schedule-Free, Cautious applies its mask, which the package computes and does not use;
- without Schedule-Free, ADOPT normalises d·g, by the deviation of d·g. The package divides g by it, which is
  1/d too much and saturates ADOPT's clamp, and then moves by d times what it should: its d stays at d0.

Each run is played again, several times over, with gradients that are off by a last bit, and of options with
weights that are too. How far that takes a run at most is kept as its noise floor.

The others, the reference Prodigy and Schedule-Free's RAdam, are played in float64, where no storage dtype
comes between us.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path

import numpy as np
import torch
from cases import (
    ANCESTOR_CASES,
    BFLOAT16_CASES,
    CASES,
    OPTION_CASES,
    PAIR_CASES,
    RADAM_CASES,
    STEPS,
    Case,
    Problem,
    distance,
    kept,
    set_lr,
)

HERE = Path(__file__).parent

# How many runs of each perturbation the noise floor is the furthest of.
PERTURBATIONS = 10


def oracle(folder: str) -> type[torch.optim.Optimizer]:
    sys.path.insert(0, folder)
    published = importlib.import_module("prodigyplus.prodigy_plus_schedulefree").ProdigyPlusScheduleFree

    class Corrected(published):  # type: ignore[misc, valid-type]
        def get_denom(self, state, group):
            if "exp_avg_sq_metadata" not in state:
                return super().get_denom(state, group)
            rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row_dim = state["exp_avg_sq_metadata"][1]
            return (rows / rows.mean(row_dim, keepdim=True).add(1e-30) * columns).sqrt()

        def update_prodigy(self, state, group, grad, data):
            super().update_prodigy(state, group, grad, data)
            if "s" in state:
                _, denominator = self.get_running_values_for_group(group)
                magnitudes = state["s"].abs()
                denominator.add_(magnitudes.sum(dtype=torch.float32) - magnitudes.sum())

        def orthograd_(self, p, grad):
            return grad if p.numel() == 1 else super().orthograd_(p, grad)

        def update_(self, num, denom, group, w):
            if group["use_adopt"] and not group["use_schedulefree"]:
                num.mul_(group["d"])
            return super().update_(num, denom, group, w)

        def update_first_moment(self, state, group, grad, beta1):
            moment = super().update_first_moment(state, group, grad, beta1)
            if group["use_adopt"]:
                moment = moment / group["d"]
            if group["use_cautious"]:  # the caller multiplies the gradient with the moment: make it the mask
                mask = (grad * moment > 0).float()
                grad.copy_(mask / mask.mean().clamp(min=1e-3))
            return moment

    return Corrected


def ancestor(folder: str) -> type[torch.optim.Optimizer]:
    sys.path.insert(0, folder)
    return importlib.import_module("prodigyopt").Prodigy


def radam(folder: str) -> type[torch.optim.Optimizer]:
    sys.path.insert(0, folder)
    return importlib.import_module("schedulefree").RAdamScheduleFree


def play(
    optimizer_class: type[torch.optim.Optimizer],
    case: Case,
    dtype: torch.dtype = torch.float32,
    **perturbation: int,
) -> dict[str, np.ndarray]:
    problem = Problem(dtype, **perturbation)
    options = {**case.options}
    if "use_speed" in options:
        options["use_speed"] = options["use_speed"] == "relative"
    optimizer = optimizer_class(problem.groups(case), **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    result, d = {}, []
    for step in range(STEPS):
        set_lr(optimizer, case, step)
        problem.backward()
        optimizer.step()
        d.append([group.get("d", group["lr"]) for group in optimizer.param_groups])
        if step + 1 == case.early:
            for number, p in enumerate(problem.parameters):
                result[f"early.{number}"] = kept(case, p).copy()
    result["d"] = np.array(d)
    for number, p in enumerate(problem.parameters):
        result[f"weight.{number}"] = kept(case, p)
        if "z" in optimizer.state[p]:
            result[f"z.{number}"] = kept(case, optimizer.state[p]["z"])
    return result


def noise_floor(optimizer_class: type, case: Case, run: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How far perturbed runs are from one: in d the most at any step, in tensors the most of any tensor."""
    gradients, weights_too = (
        [play(optimizer_class, case, perturbed=seed, weights_too=too) for seed in range(PERTURBATIONS)]
        for too in (False, True)
    )
    others = gradients + weights_too if case.early else gradients

    def furthest(early: bool) -> np.ndarray:
        keys = [key for key in run if key != "d" and key.startswith("early.") == early]
        return np.array(
            max((distance(other[key], run[key]) for other in others for key in keys), default=0.0)
        )

    return {
        "floor.d": np.array(max(np.abs(other["d"] / run["d"] - 1).max() for other in gradients)),
        "floor.early": furthest(True),
        "floor.tensors": furthest(False),
    }


def single_steps(optimizer_class: type[torch.optim.Optimizer], case: Case) -> dict[str, np.ndarray]:
    """The state before and after one step, a few times along a run in bfloat16."""
    problem = Problem(torch.bfloat16)
    optimizer = optimizer_class(problem.groups(case), stochastic_rounding=False, **case.options)
    kept: dict[str, np.ndarray] = {}

    def keep(when: str) -> None:
        group = optimizer.param_groups[0]
        for name in ("d", "d_numerator", "d_denom", "k"):
            kept[f"{when}.{name}"] = np.array(group[name])
        kept[f"{when}.weight_sum"] = np.array(group.get("weight_sum", 0.0))
        for number, p in enumerate(problem.parameters):
            kept[f"{when}.{number}.weight"] = p.detach().float().numpy()
            kept[f"{when}.{number}.grad"] = p.grad.float().numpy()
            for key, value in optimizer.state[p].items():
                if isinstance(value, torch.Tensor):
                    kept[f"{when}.{number}.{key}"] = value.detach().float().clone().numpy()

    for step in range(61):
        problem.backward()
        if step in (20, 60):
            keep(f"{step}.before")
        optimizer.step()
        if step in (20, 60):
            keep(f"{step}.after")
    return kept


def main() -> None:
    oracle_folder, ancestor_folder, schedulefree_folder = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints
        optimizer_class = oracle(oracle_folder)
        for name, case in {**CASES, **OPTION_CASES, **PAIR_CASES}.items():
            run = play(optimizer_class, case)
            floor = noise_floor(optimizer_class, case, run)
            np.savez_compressed(HERE / f"{name}.npz", **run, **floor)
        for name, case in BFLOAT16_CASES.items():
            np.savez_compressed(HERE / f"bfloat16_{name}.npz", **single_steps(optimizer_class, case))
        prodigy = ancestor(ancestor_folder)
        for name, (theirs, _) in ANCESTOR_CASES.items():
            np.savez_compressed(HERE / f"ancestor_{name}.npz", **play(prodigy, theirs, torch.float64))
        for name, (theirs, _) in RADAM_CASES.items():
            run = play(radam(schedulefree_folder), theirs, torch.float64)
            np.savez_compressed(HERE / f"radam_{name}.npz", **run)


if __name__ == "__main__":
    main()
