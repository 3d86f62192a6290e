"""The cases that make_published.py plays: states saved by the published package, and how its runs went on.

make_published.py imports this with the published package, the tests with ours; this imports neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

AFTER = 40  # steps after the save

# Every 7th element of a tensor is kept.
EVERY = 7

# Those that are factored: wide, tall, a batch of wide ones, a batch of tall ones, and a convolution.
SHAPES = (
    *((), (1,), (30,), (15, 7), (4, 3, 3, 3)),
    *((8, 36), (36, 8), (2, 4, 33), (2, 33, 3), (32, 2, 2, 2)),
)
TALL = (6, 8, 9)  # the numbers of tall tensors, with which we differ on purpose

Groups = tuple[tuple[int, dict[str, Any]], ...]


@dataclass(frozen=True)
class Saved:
    version: str
    options: dict[str, Any] = field(default_factory=dict)  # those of the published package
    # How many parameters each group takes, and its options.
    groups: Groups = ((len(SHAPES), {}),)
    before: int = 60  # the step after which it is saved: d has left d0, and still grows unless frozen
    mode: str = "train"
    dtype: torch.dtype = torch.float32
    without_gradient: tuple[int, ...] = ()
    zero_at_first: tuple[int, ...] = ()

    def grouped(self, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
        """The package's parameter groups."""
        left, groups = list(parameters), []
        for count, options in self.groups:
            groups.append({"params": left[:count], **options})
            left = left[count:]
        return groups


_TWO: Groups = ((4, {}), (6, {"d_coef": 2.0, "weight_decay": 0.02}))
_HALVES: Groups = ((4, {}), (6, {}))
_NO_SF, _NO_STABLE = {"use_schedulefree": False}, {"use_stableadamw": False}
_SPEED = {"use_speed": True}
_SOON = {"d0": 1e-3}  # so large that even few samples make progress that the rounding of p0 does not hide

SAVED = {
    "2.0_default": Saved("2.0.1"),
    "2.0_full_eval": Saved("2.0.1", {"factored": False, "weight_decay": 0.1}, mode="eval"),
    "2.0_speed": Saved("2.0.1", {**_SPEED, "d0": 1e-3}, before=25),
    "2.0_focus": Saved("2.0.1", {"use_focus": True, "factored": False, "use_orthograd": True}),
    "2.0_adam_speed": Saved("2.0.1", {**_NO_SF, **_SPEED, "d0": 1e-3, "use_grams": True}, before=25),
    "2.0_groups": Saved(
        "2.0.1", {"split_groups_mean": True, "schedulefree_c": 50.0, **_SOON}, _TWO, before=30
    ),
    "2.0_frozen": Saved("2.0.1", {"prodigy_steps": 50, "use_adopt": True}),
    "2.0_adam_groups": Saved(
        "2.0.1", {**_NO_SF, **_NO_STABLE, **_SOON, "split_groups_mean": True, "eps": None}, _TWO, before=30
    ),
    "2.0_unused_eval": Saved(
        "2.0.1",
        {"split_groups": False, "use_bias_correction": True},
        (*_HALVES, (0, {})),
        mode="eval",
        without_gradient=(1, 7),
        zero_at_first=(0, 2, 5),
    ),
    "2.0_bfloat16": Saved(
        "2.0.1", {"stochastic_rounding": False, "d0": 1e-2}, dtype=torch.bfloat16, before=10
    ),
    "1.9_default_eval": Saved("1.9.0", mode="eval", zero_at_first=(2, 5), before=22),
    "1.9_frozen": Saved("1.9.0", {**_NO_STABLE, "prodigy_steps": 30}, before=32),
    "1.9_groups": Saved(
        "1.9.0", {**_NO_STABLE, **_SOON, "factored": False, "d_coef": 0.1}, _HALVES, before=40
    ),
    "1.9_pooled": Saved("1.9.0", {"split_groups": False}, _HALVES, before=22),
    "1.9_speed": Saved("1.9.0", {**_NO_STABLE, **_SPEED}, before=45),
    "1.9_focus": Saved("1.9.0", {"use_focus": True, "factored": False}, before=22),
    "1.9_muon": Saved("1.9.0", {}, ((3, {}), (7, {"use_muon_pp": True}))),
}
