"""What a user may set, per parameter group: one dataclass, checked once.

The defaults live in one place only, the signature of
:class:`prodigyplus.ProdigyPlusScheduleFree`. Everything that reads an option reads it from an
:class:`Options`, which is taken from the group anew at every step: a scheduler may change ``lr``
and a user any other option between two steps.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of one parameter group. Their meaning is told at the optimiser's signature."""

    lr: float | Tensor
    betas: tuple[float, float]
    beta3: float | None
    weight_decay: float
    weight_decay_by_lr: bool
    use_bias_correction: bool
    d0: float
    d_coef: float
    prodigy_steps: int | None
    use_speed: bool | Literal["relative"]
    eps: float | None
    split_groups: bool
    split_groups_mean: bool
    factored: bool
    factored_fp32: bool
    fused_back_pass: bool
    use_stableadamw: bool
    use_muon_pp: bool
    muon_fp32: bool
    muon_quintic: bool
    muon_batched: bool
    use_cautious: bool
    use_grams: bool
    use_adopt: bool
    use_orthograd: bool
    use_focus: bool
    stochastic_rounding: bool
    bfloat16_z: bool
    beta4: float | None
    d_limiter: bool
    schedulefree_c: float
    use_schedulefree: bool
    slice_p: int
    compile: bool

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Options:
        """The options that a group of ``param_groups`` holds now, but for what another excludes."""
        values = {name: group[name] for name in NAMES}
        resolve_exclusions(values)
        return cls(**values)

    @property
    def prodigy_beta(self) -> float:
        """β3, the decay of Prodigy's statistics: ``beta3``, or the square root of β2."""
        return math.sqrt(self.betas[1]) if self.beta3 is None else self.beta3

    @property
    def d_beta(self) -> float:
        """β4, the decay of a moving step size; 0 is Prodigy's step size, which never shrinks."""
        return self.betas[1] if self.beta4 is None else self.beta4

    @property
    def lr_is_zero(self) -> bool:
        """Whether ``lr`` is known to be zero without waiting for a device."""
        if isinstance(self.lr, Tensor):
            return self.lr.device.type == "cpu" and not self.lr.any()
        return self.lr == 0

    @property
    def of_state(self) -> dict[str, Any]:
        """Those that say what a parameter keeps, and so may not change once it does, by name."""
        return {
            "use_schedulefree": self.use_schedulefree,
            "bfloat16_z": self.bfloat16_z,
            "use_focus": self.use_focus,
            "use_muon_pp": self.use_muon_pp,
            "use_speed": self.use_speed == "relative",
            "factored": self.factored,
            "factored_fp32": self.factored_fp32,
            "slice_p": self.slice_p,
        }

    def adapts(self, calls: int) -> bool:
        """Whether Prodigy still adapts ``d`` in the step that follows ``calls`` earlier ones."""
        return not self.prodigy_steps or calls + 1 < self.prodigy_steps


NAMES = tuple(field.name for field in fields(Options))

# Up to this β2, RAdam's rectification never leaves zero: its average is never long enough.
_SHORTEST_RECTIFIED = 0.6


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _between(low: float, high: float, *, closed: bool = True) -> Callable[[Any], bool]:
    """A test for finite numbers in [low, high), or in (low, high) if not ``closed``."""

    def test(value: Any) -> bool:
        return _is_number(value) and (low <= value if closed else low < value) and value < high

    return test


def _is_count(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _none_or(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_lr(value: Any) -> bool:
    # The value of a tensor may live on a device that nobody should wait for.
    return value.ndim == 0 if isinstance(value, Tensor) else _between(0, math.inf)(value)


def _is_pair_of_betas(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_between(0, 1), value))


_POSITIVE = (_between(0, math.inf, closed=False), "a finite number greater than 0")
_NOT_NEGATIVE = (_between(0, math.inf), "a finite number, 0 or greater")
_DECAY = (_none_or(_between(0, 1)), "None or a number in [0, 1)")
_SWITCH = (_is_bool, "True or False")

_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_lr, "a finite number, 0 or greater, or a tensor without dimensions"),
    "betas": (_is_pair_of_betas, "two numbers in [0, 1)"),
    "beta3": _DECAY,
    "beta4": _DECAY,
    "weight_decay": _NOT_NEGATIVE,
    "d0": _POSITIVE,
    "d_coef": _POSITIVE,
    "prodigy_steps": (_none_or(_is_count(0)), "None or a whole number, 0 or greater"),
    "eps": (_none_or(_POSITIVE[0]), "None (Adam-atan2) or a finite number greater than 0"),
    "schedulefree_c": _NOT_NEGATIVE,
    "slice_p": (_is_count(1), "a whole number, 1 or greater"),
    "use_speed": (lambda value: _is_bool(value) or value == "relative", "True, False or 'relative'"),
}


def validate(group: Mapping[str, Any]) -> None:
    """Check the options of one parameter group.

    Raises:
        ValueError: an option has a value it cannot have, or a key of the group looks like a
            misspelt option. The message names the option, the value and what is allowed.
    """
    for name in NAMES:
        test, allowed = _ALLOWED.get(name, _SWITCH)
        if not test(group[name]):
            raise ValueError(f"{name}={group[name]!r}: allowed is {allowed}.")
    if group["use_schedulefree"] and group["betas"][0] == 0:
        raise ValueError(
            f"betas={group['betas']!r}: Schedule-Free averages with betas[0], which must be greater "
            "than 0; or set use_schedulefree=False."
        )
    if group["use_bias_correction"] and group["betas"][1] <= _SHORTEST_RECTIFIED:
        raise ValueError(
            f"betas={group['betas']!r}: with use_bias_correction=True, betas[1] must be greater than "
            f"{_SHORTEST_RECTIFIED}, or the correction holds every step at zero."
        )
    for key in group.keys() - set(NAMES):
        # Groups may carry keys of their owner's ("name", "initial_lr"), but not a slip of the pen.
        if close := difflib.get_close_matches(key, NAMES, n=1, cutoff=0.85):
            raise ValueError(f"unknown option {key!r} in a parameter group: did you mean {close[0]!r}?")


# What excludes what, in this order: (when, what is then set, what to say of it).
_EXCLUSIONS: tuple[tuple[Callable[[Mapping[str, Any]], bool], dict[str, Any], str], ...] = (
    (
        lambda o: o["eps"] is None and o["use_stableadamw"] and not o["use_muon_pp"],  # which has no eps
        {"use_stableadamw": False},
        "eps=None (Adam-atan2) excludes use_stableadamw=True: StableAdamW is off",
    ),
    (
        lambda o: o["use_cautious"] and o["use_grams"],
        {"use_grams": False},
        "use_cautious=True excludes use_grams=True: Grams is off",
    ),
    (
        lambda o: o["use_focus"] and o["factored"],
        {"factored": False},
        "use_focus=True excludes factored=True: factored is off, and the state larger",
    ),
    (
        lambda o: o["use_focus"] and o["eps"] is None,
        {"eps": 1e-8},
        "use_focus=True excludes eps=None (Adam-atan2): Adam-atan2 is off",
    ),
    (
        lambda o: o["use_focus"] and o["use_muon_pp"],
        {"use_muon_pp": False},
        "use_focus=True excludes use_muon_pp=True: Muon is off",
    ),
    (
        lambda o: o["use_muon_pp"] and o["use_adopt"],
        {"use_adopt": False},
        "use_muon_pp=True excludes use_adopt=True: ADOPT is off, there is no second moment",
    ),
    (
        lambda o: o["use_muon_pp"] and o["use_orthograd"],
        {"use_orthograd": False},
        "use_muon_pp=True excludes use_orthograd=True: OrthoGrad is off",
    ),
)


def resolve_exclusions(group: dict[str, Any]) -> list[str]:
    """Switch off, in ``group``, what another option of it excludes; say so, a line for each."""
    notes = []
    for excludes, consequence, note in _EXCLUSIONS:
        if excludes(group):
            group.update(consequence)
            values = ", ".join(f"{name}={value!r}" for name, value in consequence.items())
            notes.append(f"{note}. Pass {values} to silence this.")
    return notes
