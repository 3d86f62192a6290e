"""The golden runs: a problem with the same numbers on every processor, and the options it is played with.

make.py imports this with the published packages, the tests with ours; this imports neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

STEPS = 120

# The numbers of a group that are kept at every step of a run: d, and the evidence that moves it.
CURVES = ("d", "d_numerator", "d_denom")

# 0 to 4 dimensions; wide, square and tall; factored, and too small for that; equal sizes.
SHAPES = ((), (1,), (50,), (12, 40), (36, 36), (64, 20), (31, 7), (3, 33, 10), (34, 6, 3, 3), (8, 6, 3, 3))


@dataclass(frozen=True)
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    # How many parameters each group takes, and its options besides the case's.
    groups: tuple[tuple[int, dict[str, Any]], ...] = ((len(SHAPES), {}),)
    # The lr at each step, counted from 0.
    schedule: Callable[[int], float] | None = None
    steps: int = STEPS
    # Every how-many-th element of each tensor is kept.
    every: int = 1
    # The fractions of the run after which the weights are kept; early ones, in case it turns chaotic.
    kept_at: tuple[float, ...] = (1,)

    @property
    def kept_steps(self) -> list[int]:
        """The steps after which the weights are kept."""
        return [round(fraction * self.steps) for fraction in self.kept_at]


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

_SPEED = {"use_speed": "relative"}  # 2.0.1's SPEED, which is use_speed=True there
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
    "focus": {**_FOCUS, "d0": 2e-6},  # with this d0, no sign depends on a last bit
}

_OFTEN: dict[str, Any] = {"every": 7, "kept_at": (0.5, 0.75, 1)}

OPTION_CASES = {
    **{name: Case(options, **_OFTEN) for name, options in _ALONE.items()},
    **{f"adam_{name}": Case({**_NO_SF, **options}, **_OFTEN) for name, options in _ALONE.items()},
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
        **_OFTEN,
    )
    for name, pair in _PAIRS.items()
}

# Cases in bfloat16: single steps from a state that the oracle has reached.
BFLOAT16_CASES = {
    "default": Case(),
    "full": Case({"factored": False}),
    "low_precision_factors": Case({"factored_fp32": False}),
    "weight_decay": Case({"weight_decay": 0.1}),
    "adam": Case(_NO_SF),
}

# The reference Prodigy, and our options that come to the same algorithm, but for one thing: it divides by
# sqrt(V) + d·eps with the d of the step's end, we with that of its start. So eps is small in most cases.
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
    return Case(options, groups, **_OFTEN), Case({**_PRODIGY, **options}, groups, **_OFTEN)


ANCESTOR_CASES = {
    "default": _both(eps=1e-20),
    "weight_decay": _both(eps=1e-20, weight_decay=0.1),
    "beta3": _both(eps=1e-20, beta3=0.9, d0=1e-5),
    "groups": _both(_TWO, eps=1e-20),
    "with_eps": _both(eps=1e-8),
}


# Schedule-Free's RAdam at a fixed learning rate; it equals ours if Prodigy never moves d from d0.
_RADAM = {
    "use_bias_correction": True,
    "prodigy_steps": 1,
    "factored": False,
    "use_stableadamw": False,
}
RADAM_CASES = {
    name: tuple(
        Case({"betas": betas, **decay, **options}, **_OFTEN)
        for options in ({"lr": 1e-3}, {**_RADAM, "d0": 1e-3})
    )
    for name, betas, decay in (
        ("default", (0.9, 0.99), {}),
        ("betas", (0.95, 0.9), {}),
        ("weight_decay", (0.9, 0.99), {"weight_decay": 0.1}),
    )
}


class Numbers:
    """Random numbers that are the same to the bit on every processor, and with every build of torch.

    numpy promises that the words of its bit generators never change, and exact operations turn them into
    float32. ``torch.randn`` and ``exp`` would not do: their last bits depend on the processor's instructions.

    Args:
        seed: The generator's seed.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.PCG64(seed)

    def _bits(self, shape: Sequence[int], *counts: int) -> list[np.ndarray]:
        """A random word for each element, cut into integers of these bit counts; shapes (elements,)."""
        words, pieces = self._words.random_raw(math.prod(shape)), []
        for bits in counts:
            pieces.append((words & np.uint64(2**bits - 1)).astype(np.int32))
            words >>= np.uint64(bits)
        return pieces

    def bells(self, shape: Sequence[int]) -> Tensor:
        """Numbers of mean 0 and standard deviation 1, within ±3: sums of three uniform 16-bit numbers."""
        total = sum(self._bits(shape, 16, 16, 16))
        return torch.from_numpy(np.ldexp((2 * total - 3 * 0xFFFF).astype(np.float32), -16)).reshape(shape)

    def positives(self, shape: Sequence[int]) -> Tensor:
        """Numbers from 1/8 to 16, uniform within an octave, mostly a middle one; half are in [2/3, 10/3]."""
        fraction, one, another = self._bits(shape, 16, 2, 2)
        mantissa = 1 + np.ldexp(fraction.astype(np.float32), -16)
        return torch.from_numpy(np.ldexp(mantissa, one + another - 3)).reshape(shape)

    def signs(self, shape: Sequence[int]) -> Tensor:
        """−1, 0 or 1, with 0 twice as likely."""
        one, another = self._bits(shape, 1, 1)
        return torch.from_numpy((one - another).astype(np.float32)).reshape(shape)


class Perturbation:
    """Changes tensors by some last bits, up or down.

    Args:
        seed: Decides which elements go up and which down.
        last_bits: By how many last bits.
    """

    def __init__(self, seed: int, last_bits: int) -> None:
        self._numbers, self._last_bits = Numbers(1 + seed), last_bits

    def apply_(self, values: Tensor) -> None:
        off = self._last_bits * torch.finfo(values.dtype).eps
        values.mul_(1 + off * self._numbers.signs(values.shape).to(values.dtype))


class Problem:
    """A noisy quadratic in each parameter: ``g = curvature·(w − target) + noise``.

    Its numbers are exact, and its gradients are products and sums of two numbers each, which every processor
    rounds alike. So the same weights have the same gradients everywhere, to the bit.

    Args:
        dtype: The parameters' dtype.
        shapes: The parameters' shapes.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
    ) -> None:
        self._perturbation: Perturbation | None = None
        self._weights_too = False
        self._numbers = Numbers(0)
        self.parameters = [torch.nn.Parameter(self._numbers.bells(shape).to(dtype)) for shape in shapes]
        self._targets = [self._numbers.bells(shape) for shape in shapes]
        self._curvatures = [self._numbers.positives(shape) for shape in shapes]

    def groups(self, case: Case) -> list[dict[str, Any]]:
        groups, start = [], 0
        for count, options in case.groups:
            groups.append({"params": self.parameters[start : start + count], **options})
            start += count
        return groups

    def perturb(self, perturbation: Perturbation, weights_too: bool = False) -> None:
        """From now on, perturb the terms that gradients sum; with ``weights_too``, the weights as well."""
        self._perturbation, self._weights_too = perturbation, weights_too

    @torch.no_grad()
    def backward(self) -> None:
        """Give each parameter a gradient."""
        for p, target, curvature in zip(self.parameters, self._targets, self._curvatures, strict=True):
            noise = self._numbers.bells(p.shape)
            exact = torch.promote_types(p.dtype, torch.float32)
            signal = curvature * (p.to(exact) - target)
            if self._perturbation is not None:
                for values in (signal, p) if self._weights_too else (signal,):
                    self._perturbation.apply_(values)
            # Scaling by powers of two is exact, so a fused multiply-add makes no difference.
            grad = (signal + 2**-2 * noise).mul_(2**-7)
            p.grad = grad.to(p.dtype)

    @torch.no_grad()
    def loss(self) -> float:
        """The loss that the gradients, without their noise, belong to; in units of 2**-7."""
        return sum(
            float((curvature * (p.to(target.dtype) - target).square()).sum()) / 2
            for p, target, curvature in zip(self.parameters, self._targets, self._curvatures, strict=True)
        )


def play(
    optimizer: torch.optim.Optimizer, problem: Problem, case: Case, curves: Sequence[str] = CURVES
) -> dict[str, np.ndarray]:
    """Make the steps of a case, and keep the numbers by which two packages are compared.

    Args:
        optimizer: An optimiser of the problem's parameters, in the case's groups.
        problem: The problem.
        case: The case.
        curves: The numbers of a parameter group that are kept.

    Returns:
        Each curve, of shape (steps, groups); "weights" after the case's kept steps, of shape (kept steps,
        kept elements); and "z" at the end, of shape (kept elements,), if the optimiser has one.
        :func:`tensors` splits them by tensor.
    """
    numbers: dict[str, list[list[float]]] = {name: [] for name in curves}
    weights = []
    for step in range(case.steps):
        if case.schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = case.schedule(step)
        problem.backward()
        optimizer.step()
        for name, rows in numbers.items():
            rows.append([float(group[name]) for group in optimizer.param_groups])
        if step + 1 in case.kept_steps:
            weights.append(_kept(case, problem.parameters))
    result = {**{name: np.array(rows) for name, rows in numbers.items()}, "weights": np.array(weights)}
    if all("z" in optimizer.state[p] for p in problem.parameters):
        result["z"] = _kept(case, [optimizer.state[p]["z"] for p in problem.parameters])
    return result


def _kept(case: Case, tensors: Sequence[Tensor]) -> np.ndarray:
    """The kept elements of all tensors, one after another; shape (kept elements,)."""
    return torch.cat([tensor.detach().flatten()[:: case.every] for tensor in tensors]).numpy()


def tensors(kept: np.ndarray, case: Case) -> list[np.ndarray]:
    """Split the kept elements of all tensors by tensor; shapes (…, kept elements)."""
    sizes = [-(-math.prod(shape) // case.every) for shape in SHAPES]
    return np.split(kept, np.cumsum(sizes)[:-1], axis=-1)


def distance(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The relative distance between two tensors, or several pairs: the 2-norm over the last dimension."""
    return np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)


def distances(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], case: Case
) -> dict[str, np.ndarray]:
    """How far a run is from another, relative to the other.

    Returns:
        For a curve, the largest distance of any group at each step, relative to the largest value so far;
        shape (steps,). For "weights" and "z", each tensor's distance; shapes (kept steps, tensors) and
        (1, tensors).
    """
    result = {}
    for name in theirs.keys() & {*CURVES}:
        unit = np.maximum.accumulate(np.abs(theirs[name]))
        off = np.abs(ours[name] - theirs[name])
        result[name] = np.divide(off, unit, out=off, where=unit > 0).max(axis=1)
    for name in theirs.keys() & {"weights", "z"}:
        pairs = zip(tensors(ours[name], case), tensors(theirs[name], case), strict=True)
        result[name] = np.array([distance(one, other) for one, other in pairs]).T.reshape(-1, len(SHAPES))
    return result
