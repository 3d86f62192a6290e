"""The golden runs: a problem that whoever plays it computes alike, and the options it is played with.

Imported by make.py beside the oracle and by the tests beside our own package; imports neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

STEPS = 300

# Every number of dimensions from 0 to 4; wide, square, tall; factored and too small for it; equal sizes.
SHAPES = ((), (1,), (50,), (12, 40), (36, 36), (64, 20), (31, 7), (3, 33, 10), (34, 6, 3, 3), (8, 6, 3, 3))


@dataclass(frozen=True)
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    # How many parameters each group takes, and what its options are beside the case's.
    groups: tuple[tuple[int, dict[str, Any]], ...] = ((len(SHAPES), {}),)
    # A schedule: what lr is multiplied with at a step, from 0.
    schedule: Callable[[int], float] | None = None
    # Of each tensor, every so-manieth element is kept.
    every: int = 1
    # A step after which the weights are kept too: before the run has turned chaotic, if it does.
    early: int = 0


_TWO = ((4, {}), (6, {}))
_THREE = ((4, {}), (2, {"d_coef": 2.0}), (4, {"weight_decay": 0.02, "betas": (0.95, 0.98)}))
_NO_SF = {"use_schedulefree": False}

CASES = {
    "default": Case(),
    "full": Case({"factored": False}),
    "full_without_stableadamw": Case({"factored": False, "use_stableadamw": False}),
    "without_stableadamw": Case({"use_stableadamw": False}),
    "weight_decay": Case({"weight_decay": 0.1}),
    "weight_decay_not_by_lr": Case({"weight_decay": 1e-3, "weight_decay_by_lr": False}),
    "groups_apart": Case({"split_groups_mean": False}, _TWO),
    "groups_mean": Case({"split_groups_mean": True}, _TWO),
    "groups_mean_that_differ": Case({"split_groups_mean": True}, _THREE),
    "groups_pooled": Case({"split_groups": False}, _TWO),
    "prodigy_steps": Case({"prodigy_steps": 40}),
    "without_limiter": Case({"d_limiter": False}),
    "schedulefree_c": Case({"schedulefree_c": 50.0}),
    "betas": Case({"betas": (0.95, 0.999), "beta3": 0.98}),
    "d_coef_and_d0": Case({"d_coef": 2.0, "d0": 1e-5}),
    "schedule": Case({}, schedule=lambda step: min(1.0, (step + 1) / 20) * (1 - step / (2 * STEPS))),
    "atan2": Case({"eps": None, "use_stableadamw": False}),
    "atan2_full": Case({"eps": None, "use_stableadamw": False, "factored": False}),
    "adam": Case(_NO_SF),
    "adam_full": Case({**_NO_SF, "factored": False, "use_stableadamw": False}),
    "adam_weight_decay": Case({**_NO_SF, "weight_decay": 0.1}),
    "adam_weight_decay_not_by_lr": Case({**_NO_SF, "weight_decay": 1e-3, "weight_decay_by_lr": False}),
    "adam_atan2_groups": Case({**_NO_SF, "eps": None, "use_stableadamw": False, "split_groups": False}, _TWO),
}

_SPEED = {"use_speed": "relative"}  # 2.0.1's; it is True there
_BIAS, _CAUTIOUS, _GRAMS = {"use_bias_correction": True}, {"use_cautious": True}, {"use_grams": True}
_ADOPT, _ORTHOGRAD, _FOCUS = (
    {"use_adopt": True},
    {"use_orthograd": True},
    {"use_focus": True, "factored": False},
)
_ATAN2 = {"eps": None, "use_stableadamw": False}
_NOT_BY_LR = {"weight_decay": 1e-3, "weight_decay_by_lr": False}

_ALONE = {
    "speed": _SPEED,
    "bias_correction": _BIAS,
    "cautious": _CAUTIOUS,
    "grams": _GRAMS,
    "adopt": _ADOPT,
    "orthograd": _ORTHOGRAD,
    "focus": {**_FOCUS, "d0": 2e-6},  # at which no sign hangs on a last bit
}

OPTION_CASES = {
    **{name: Case(options, every=7, early=60) for name, options in _ALONE.items()},
    **{f"adam_{name}": Case({**_NO_SF, **options}, every=7, early=60) for name, options in _ALONE.items()},
}

_PAIRS = {
    "speed_groups": (_SPEED, {"split_groups_mean": True}),
    "speed_d_coef": (_SPEED, {"d_coef": 2.0}),
    "speed_prodigy_steps": (_SPEED, {"prodigy_steps": 40}),
    "speed_bias_correction": (_SPEED, _BIAS),
    "speed_adopt": (_SPEED, _ADOPT),
    "speed_focus": (_SPEED, _FOCUS),
    "bias_correction_cautious": (_BIAS, _CAUTIOUS),
    "bias_correction_weight_decay": (_BIAS, {"weight_decay": 0.1}),
    "bias_correction_adopt": (_BIAS, _ADOPT),
    "adopt_atan2": (_ADOPT, _ATAN2),
    "adopt_cautious": (_ADOPT, _CAUTIOUS),
    "adopt_grams": (_ADOPT, _GRAMS),
    "adopt_orthograd": (_ADOPT, _ORTHOGRAD),
    "cautious_weight_decay": (_CAUTIOUS, {"weight_decay": 0.1}),
    "cautious_weight_decay_not_by_lr": (_CAUTIOUS, _NOT_BY_LR),
    "cautious_orthograd": (_CAUTIOUS, _ORTHOGRAD),
    "cautious_atan2": (_CAUTIOUS, _ATAN2),
    "cautious_focus": (_CAUTIOUS, _FOCUS),
    "grams_weight_decay": (_GRAMS, {"weight_decay": 0.1}),
    "grams_orthograd": (_GRAMS, _ORTHOGRAD),
    "orthograd_weight_decay": (_ORTHOGRAD, {"weight_decay": 0.1}),
    "orthograd_full": (_ORTHOGRAD, {"factored": False, "use_stableadamw": False}),
    "adam_speed_grams": (_NO_SF, _SPEED, _GRAMS),
    "adam_speed_bias_correction": (_NO_SF, _SPEED, _BIAS),
    "adam_bias_correction_adopt": (_NO_SF, _BIAS, _ADOPT),
    "adam_adopt_cautious": (_NO_SF, _ADOPT, _CAUTIOUS),
    "adam_adopt_grams": (_NO_SF, _ADOPT, _GRAMS),
    "adam_adopt_focus": (_NO_SF, _ADOPT, _FOCUS),
    "adam_cautious_atan2": (_NO_SF, _CAUTIOUS, _ATAN2),
    "adam_cautious_focus": (_NO_SF, _CAUTIOUS, _FOCUS),
    "adam_cautious_orthograd": (_NO_SF, _CAUTIOUS, _ORTHOGRAD),
    "adam_orthograd_weight_decay": (_NO_SF, _ORTHOGRAD, {"weight_decay": 0.1}),
}

PAIR_CASES = {
    name: Case(
        {key: value for options in pair for key, value in options.items()},
        _TWO if "groups" in name else Case().groups,
        every=7,
        early=60,
    )
    for name, pair in _PAIRS.items()
}

# The same, rounded to bfloat16: single steps from a state that the oracle has reached.
BFLOAT16_CASES = {
    "default": Case(),
    "full": Case({"factored": False}),
    "low_precision_factors": Case({"factored_fp32": False}),
    "weight_decay": Case({"weight_decay": 0.1}),
    "adam": Case(_NO_SF),
}

# The reference Prodigy, and our options where they come to the same algorithm. One thing is left over: it
# divides by sqrt(V) + d·eps with the d of the step's end, we with that of its start. So eps is small here.
_PRODIGY = {
    "use_schedulefree": False,
    "factored": False,
    "slice_p": 1,
    "use_stableadamw": False,
    "d_limiter": False,
    "split_groups": False,
    "betas": (0.9, 0.999),
}


def _both(
    groups: tuple[tuple[int, dict[str, Any]], ...] = Case().groups, **options: float
) -> tuple[Case, Case]:
    return Case(options, groups), Case({**_PRODIGY, **options}, groups)


ANCESTOR_CASES = {
    "default": _both(eps=1e-20),
    "weight_decay": _both(eps=1e-20, weight_decay=0.1),
    "beta3": _both(eps=1e-20, beta3=0.9, d0=1e-5),
    "groups": _both(_TWO, eps=1e-20),
    "with_eps": _both(eps=1e-8),
}


# Schedule-Free's RAdam at a fixed learning rate: ours where Prodigy never moves d from d0.
_RADAM = {
    "use_bias_correction": True,
    "prodigy_steps": 1,
    "factored": False,
    "use_stableadamw": False,
}
RADAM_CASES = {
    name: tuple(
        Case({"betas": betas, **decay, **options}, every=7)
        for options in ({"lr": 1e-3}, {**_RADAM, "d0": 1e-3})
    )
    for name, betas, decay in (
        ("default", (0.9, 0.99), {}),
        ("betas", (0.95, 0.9), {}),
        ("weight_decay", (0.9, 0.99), {"weight_decay": 0.1}),
    )
}


class Problem:
    """A noisy quadratic in each parameter: ``g = curvature·(w − target) + noise``.

    Perturbed, its gradients are off by a last bit, as if sums in them had been taken in another order; or its
    weights too, as if the optimiser's own had. What that does to a run is the noise floor, below which two
    runs cannot be told apart.

    Args:
        dtype: Of the parameters.
        perturbed: The seed of the perturbation; None for none.
        weights_too: Whether it is of the weights too.
        shapes: Of the parameters.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        perturbed: int | None = None,
        weights_too: bool = False,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
    ) -> None:
        self._perturbation = None if perturbed is None else torch.Generator().manual_seed(perturbed)
        self._weights_too = weights_too
        self._random = torch.Generator().manual_seed(0)
        self.parameters = [torch.nn.Parameter(self._normal(shape).to(dtype)) for shape in shapes]
        self._targets = [self._normal(shape) for shape in shapes]
        self._curvatures = [self._normal(shape).exp() for shape in shapes]

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self._random)

    def groups(self, case: Case) -> list[dict[str, Any]]:
        groups, start = [], 0
        for count, options in case.groups:
            groups.append({"params": self.parameters[start : start + count], **options})
            start += count
        return groups

    @torch.no_grad()
    def backward(self) -> None:
        """Put a gradient into each parameter."""
        for p, target, curvature in zip(self.parameters, self._targets, self._curvatures, strict=True):
            noise = self._normal(p.shape)
            exact = torch.promote_types(p.dtype, torch.float32)
            grad = (curvature * (p.to(exact) - target) + 0.3 * noise).mul_(0.01)
            if self._perturbation is not None:
                for values in (grad, p) if self._weights_too else (grad,):
                    signs = torch.randint(-1, 2, p.shape, generator=self._perturbation)
                    values.mul_(1 + 2**-23 * signs)
            p.grad = grad.to(p.dtype)

    @torch.no_grad()
    def loss(self) -> float:
        """What the gradients, but for their noise, are those of; in units of a hundredth."""
        return sum(
            float((curvature * (p.to(target.dtype) - target).square()).sum()) / 2
            for p, target, curvature in zip(self.parameters, self._targets, self._curvatures, strict=True)
        )


def set_lr(optimizer: torch.optim.Optimizer, case: Case, step: int) -> None:
    if case.schedule is not None:
        for group in optimizer.param_groups:
            group["lr"] = case.schedule(step)


def kept(case: Case, tensor: Tensor) -> np.ndarray:
    """What is kept of a tensor at the end of a run."""
    tensor = tensor.detach()
    return (tensor if case.every == 1 else tensor.flatten()[:: case.every]).numpy()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The relative distance of two tensors, in the norm over all their elements."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
