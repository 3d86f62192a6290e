"""Make the golden runs: play the cases of cases.py with the published packages, and keep the results.

    pip install --no-deps --target ORACLE prodigy-plus-schedule-free==2.0.1
    pip install --no-deps --target ANCESTOR prodigyopt==1.1.2
    pip install --no-deps --target SCHEDULEFREE schedulefree==1.4.1
    python tests/golden/make.py ORACLE ANCESTOR SCHEDULEFREE [FILE ...]

"The oracle" is the first of these. It has our import name, so our package must not be imported in the same
process. It is corrected where we differ on purpose and the numbers would show it:

- the row factor of tall tensors is normalised by its true mean;
- p0 is kept in the weight's dtype, and compared and multiplied in float32 at least. The package rounds p0 to
  bfloat16, so that the rounding passes for progress, and computes in bfloat16 if the weights are bfloat16;
- ‖s‖₁ of a tensor is summed in float32. The package rounds the sum to bfloat16, the dtype that s is stored
  in. That changes a tensor's share of d's denominator by up to 0.4 %, and a last bit of a gradient may decide
  how it is rounded;
- OrthoGrad leaves tensors of one element alone;
- without Schedule-Free, Cautious applies its mask, which the package computes but does not use;
- without Schedule-Free, ADOPT divides d·g by the root of the second moment of d·g. The package divides g by
  it, which is too large by 1/d and saturates ADOPT's clamp. It then moves by d times what it should, and its
  d stays at d0.

Each run is repeated several times with perturbations, as floors.py says. Two things are kept with it: the
noise floor, and "excess", how far one of the repetitions is off at most, relative to the bounds that the
others give.

The reference Prodigy and Schedule-Free's RAdam run in float64, where the dtypes that state is stored in make
no difference. The reference Prodigy decays the weights before it moves them, while we do both at once; so in
its perturbed runs, the weights are perturbed, too. If files are named, only they are made.
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
            if group["use_cautious"]:  # the caller multiplies moment and gradient: put the mask in its place
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
    """A run, with its noise floor under "floor.…" and its :func:`excess` under "excess".

    With ``weights_too``, perturbed runs have perturbed weights, too.
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
    """How far a perturbed run is off at most, relative to the bounds that the others give."""
    found = 0.0
    for number, one in enumerate(distances):
        own = furthest([one])
        others = furthest([other for index, other in enumerate(distances) if index != number])
        for name, values in own.items():
            allowed = bounds(others[name], dtype, WINDOW if name in CURVES else 0)
            found = max(found, (values[: len(allowed)] / allowed).max(initial=0.0))
    return float(found)


def single_steps(optimizer_class: type[torch.optim.Optimizer], case: Case) -> dict[str, np.ndarray]:
    """The state before and after a step, at a few steps of a run in bfloat16."""
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
