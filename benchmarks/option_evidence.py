"""What each option does to the loss, on five small tasks, beside the same run without it.

    PYTHONPATH=. python benchmarks/option_evidence.py --out FILE [--tasks …] [--variants …] [--seeds …]
    PYTHONPATH=. python benchmarks/option_evidence.py --out FILE --report

The first trains, and adds a line to the file for each run that it does not have. The second prints the tables
of docs/options.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import peers, results
from quality.variants import FEW, Change, Variant, changes, command

NUDGED = "d0=1.1e-06"
MUON: dict[str, Any] = {"split_groups_mean": False, "muon_fp32": True}  # bfloat16 is slow on a CPU

# What may be set beside either step size. Each is a row of the table.
EITHER: dict[str, dict[str, Any]] = {
    "betas=(0.95, 0.99)": {"betas": (0.95, 0.99)},
    "betas=(0.9, 0.999)": {"betas": (0.9, 0.999)},
    "weight_decay=0.1": {"weight_decay": 0.1},
    "schedulefree_c=30": {"schedulefree_c": 30.0},
    "factored=False": {"factored": False},
    "use_stableadamw=False": {"use_stableadamw": False},
    "eps=None": {"eps": None, "use_stableadamw": False},
    "use_bias_correction=True": {"use_bias_correction": True},
    "warmup_steps=100": {"warmup_steps": 100},
    "use_adopt=True": {"use_adopt": True},
    "use_cautious=True": {"use_cautious": True},
    "use_grams=True": {"use_grams": True},
    "use_orthograd=True": {"use_orthograd": True},
    "use_focus=True": {"use_focus": True, "factored": False},
    "bfloat16_z=True": {"bfloat16_z": True},
}
OF_PRODIGY: dict[str, dict[str, Any]] = {
    "use_schedulefree=False": {"use_schedulefree": False},
    "use_speed=True": {"use_speed": True},
    'use_speed="relative"': {"use_speed": "relative"},
    "d_coef=0.5": {"d_coef": 0.5},
    "d_coef=2": {"d_coef": 2.0},
    "d_limiter=False": {"d_limiter": False},
    "beta4=None": {"beta4": None},
    "slice_p=1": {"slice_p": 1},
    "prodigy_steps=100": {"prodigy_steps": 100},
}


def of(step_size: str, options: dict[str, dict[str, Any]]) -> dict[str, Variant]:
    """The variants of a step size, each named after it and the option."""
    make, nudged = partial(partial, peers.ours, step_size=step_size), f"{step_size}: {NUDGED}"
    return {
        step_size: Variant(make()),
        nudged: Variant(make(d0=1.1e-6), step_size, nudged),
        **{f"{step_size}: {name}": Variant(make(**its), step_size, nudged) for name, its in options.items()},
        f"{step_size}: use_muon_pp=True": Variant(
            partial(peers.ours_muon, step_size=step_size, **MUON), step_size, nudged
        ),
    }


VARIANTS = {**of("balance", EITHER), **of("prodigy", EITHER | OF_PRODIGY)}


def report(rows: Iterable[results.Row]) -> Iterator[str]:
    """The tables: a row for each option, a column for each task, what helps in bold."""
    found = changes(rows, VARIANTS)
    for step_size in ("balance", "prodigy"):
        yield f'\nBeside `step_size="{step_size}"`:\n'
        yield f"| option | {' | '.join(FEW)} | helps, hurts |"
        yield f"|---|{'--:|' * len(FEW)}---|"
        for name, of_task in found.items():
            if VARIANTS[name].beside == step_size:
                option = name.partition(": ")[2]
                verdicts = [its.verdict for its in of_task.values()]
                total = f"{verdicts.count('helps')}, {verdicts.count('hurts')}"
                cells = [shown(of_task[task]) if task in of_task else "" for task in FEW]
                yield f"| `{option}` | {' | '.join(cells)} | {total} |"


def shown(change: Change) -> str:
    """A change of the loss in percent; bold where it helps, in brackets where it is nothing."""
    percent = f"{100 * (change.ratio - 1):+.1f}".replace("-", "−")
    return {"helps": f"**{percent}**", "hurts": percent, "nothing": f"({percent})"}[change.verdict]


if __name__ == "__main__":
    command(__doc__, VARIANTS, report)
