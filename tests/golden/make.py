"""Make the golden runs: play cases.py with the published packages, and keep what came of it.

    pip install --no-deps --target ORACLE prodigy-plus-schedule-free==2.0.1
    pip install --no-deps --target ANCESTOR prodigyopt==1.1.2
    pip install --no-deps --target SCHEDULEFREE schedulefree==1.4.1
    python tests/golden/make.py ORACLE ANCESTOR SCHEDULEFREE [FILE ...]

The first, the oracle, has our import name, so it runs in a process without us. It is corrected in the places
where we differ on purpose and the numbers would show it:

- the row factor of tall tensors is normalised by its true mean;
- p0 is kept in the weight's dtype, and what it is compared with and multiplied by is in float32 at least. The
  package rounds p0 to bfloat16, whose distance to the weights is progress that nobody made, and takes both
  in bfloat16 where the weights are;
- ‖s‖₁ of a tensor is summed in float32. The package rounds it to bfloat16, the dtype that s is stored in,
  which puts up to 0.4 % on a tensor's share of d's denominator, and turns a last bit of a gradient into
  as much where it tips the rounding;
- OrthoGrad leaves tensors of one element alone;
- without Schedule-Free, Cautious applies its mask, which the package computes and does not use;
- without Schedule-Free, ADOPT normalises d·g, by the deviation of d·g. The package divides g by it, which is
  1/d too much and saturates ADOPT's clamp, and then moves by d times what it should: its d stays at d0.

Each run is played again, several times over, as floors.py says. How far that takes a run at most is kept
beside it, as its noise floor; and how far one of those runs is from it, in units of the bounds that its
others give.

The others, the reference Prodigy and Schedule-Free's RAdam, are played in float64, where no storage dtype
comes between us. The first decays its weights before it moves them, we in the same product: in its perturbed
runs, the weights are off too. Where files are named, only they are made.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cases import (
    ANCESTOR_CASES,
    BFLOAT16_CASES,
    CASES,
    CURVES,
    OPTION_CASES,
    PAIR_CASES,
    RADAM_CASES,
    Case,
    Perturbation,
    Problem,
    distances,
    play,
)
from floors import PERTURBATIONS, WINDOW, bounds, furthest, last_bits

HERE = Path(__file__).parent


def oracle(folder: str) -> type[torch.optim.Optimizer]:
    sys.path.insert(0, folder)
    published = importlib.import_module("prodigyplus.prodigy_plus_schedulefree").ProdigyPlusScheduleFree

    class Corrected(published):  # type: ignore[misc, valid-type]
        def initialise_state_internal(self, p, group):
            state, new = super().initialise_state_internal(p, group)
            if new:
                state["p0"] = self.get_sliced_tensor(p.detach()).clone()
            return state, new

        def get_denom(self, state, group):
            if "exp_avg_sq_metadata" not in state:
                return super().get_denom(state, group)
            rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row_dim = state["exp_avg_sq_metadata"][1]
            return (rows / rows.mean(row_dim, keepdim=True).add(1e-30) * columns).sqrt()

        def update_prodigy(self, state, group, grad, data):
            super().update_prodigy(state, group, grad.float(), data.float())
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


def golden(
    optimizer_class: type[torch.optim.Optimizer],
    case: Case,
    dtype: torch.dtype = torch.float32,
    curves: Sequence[str] = CURVES,
    weights_too: bool = False,
) -> dict[str, np.ndarray]:
    """A run, its noise floor under "floor.…", and "excess": see :func:`excess`.

    With ``weights_too``, the weights are perturbed beside the gradients.
    """
    options = {**case.options}
    if "use_speed" in options:
        options["use_speed"] = options["use_speed"] == "relative"

    def run(perturbed: int | None = None) -> dict[str, np.ndarray]:
        problem = Problem(dtype)
        optimizer = optimizer_class(problem.groups(case), **options)
        if perturbed is not None:
            problem.perturb(Perturbation(perturbed, last_bits(case.options)), weights_too)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return play(optimizer, problem, case, curves)

    unperturbed = run()
    others = [distances(run(seed), unperturbed, case) for seed in range(PERTURBATIONS)]
    floor = {f"floor.{name}": values for name, values in furthest(others).items()}
    return {**unperturbed, **floor, "excess": np.array(excess(others, dtype))}


def excess(distances: Sequence[Mapping[str, np.ndarray]], dtype: torch.dtype) -> float:
    """How far a perturbed run is at most, in units of the bound that the others give; 1 is within."""
    found = 0.0
    for number, one in enumerate(distances):
        own = furthest([one])
        others = furthest([other for index, other in enumerate(distances) if index != number])
        for name, values in own.items():
            allowed = bounds(others[name], dtype, WINDOW if name in CURVES else 0)
            found = max(found, (values[: len(allowed)] / allowed).max(initial=0.0))
    return float(found)


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
    oracle_folder, ancestor_folder, schedulefree_folder, *files = sys.argv[1:]
    optimizer_class = oracle(oracle_folder)
    prodigy, radam_class = ancestor(ancestor_folder), radam(schedulefree_folder)
    makers: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        **{
            f"{name}.npz": partial(golden, optimizer_class, case)
            for name, case in {**CASES, **OPTION_CASES, **PAIR_CASES}.items()
        },
        **{
            f"bfloat16_{name}.npz": partial(single_steps, optimizer_class, case)
            for name, case in BFLOAT16_CASES.items()
        },
        **{
            f"ancestor_{name}.npz": partial(golden, prodigy, theirs, torch.float64, ["d"], weights_too=True)
            for name, (theirs, _) in ANCESTOR_CASES.items()
        },
        **{
            f"radam_{name}.npz": partial(golden, radam_class, theirs, torch.float64, [])
            for name, (theirs, _) in RADAM_CASES.items()
        },
    }
    for file in files or makers:
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints
            made = makers[file]()
        np.savez_compressed(HERE / file, **made)


if __name__ == "__main__":
    main()
