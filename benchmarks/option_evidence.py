"""What each option does to the loss on five small tasks, compared with the same run without it.

    PYTHONPATH=. python benchmarks/option_evidence.py --out FILE [--tasks …] [--variants …] [--seeds …]
    PYTHONPATH=. python benchmarks/option_evidence.py --out FILE --report

The first trains, and adds a line to the file for each run that it does not have. The second prints
docs/evidence.md.
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

# Options to try with either step size. Each is a row of the table.
EITHER: dict[str, dict[str, Any]] = {
    NUDGED: {"d0": 1.1e-6},
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
    builds = {name: partial(peers.ours, step_size=step_size, **its) for name, its in options.items()}
    builds["use_muon_pp=True"] = partial(peers.ours_muon, step_size=step_size, split_groups_mean=False)
    compared = {
        f"{step_size}: {name}": Variant(build, step_size, f"{step_size}: {NUDGED}")
        for name, build in builds.items()
    }
    return {step_size: Variant(partial(peers.ours, step_size=step_size)), **compared}


VARIANTS = {**of("balance", EITHER), **of("prodigy", EITHER | OF_PRODIGY)}


INTRODUCTION = """\
# What options do to the loss

The figures on this page are printed by

    PYTHONPATH=. python benchmarks/option_evidence.py --out docs/research/options.jsonl
    PYTHONPATH=. python benchmarks/option_evidence.py --out docs/research/options.jsonl --report

How much the final loss of a small task changes with an option, in percent; negative is better. **Bold**
helps. Changes in brackets are too small to count: within 1 %, or within twice the change from starting
at 1.1 times `d0`, which should make no difference. Chance does at least that much: with an earlier
version of balance, starting at 1.1 times `d0` changed the regression by 4 and the MLP by 3 %. The last
column counts the tasks that the option helps and hurts.

The tasks are those of [quality.md](quality.md): half a minute on one core, one seed, Schedule-Free
evaluated at its average. They say where an option may matter, not what it does to a long run of a large
model. What options cost is in [options.md](options.md).

`eps=None` was run with `use_stableadamw=False`, and `use_focus=True` with `factored=False`, as they require.
`use_muon_pp=True` is for the hidden matrices, with a step size of their own, orthogonalised in float32."""


def report(rows: Iterable[results.Row]) -> Iterator[str]:
    """The page: a row for each option, a column for each task."""
    yield INTRODUCTION
    found = changes(rows, VARIANTS)
    for step_size in ("balance", "prodigy"):
        its = {name: change for name, change in found.items() if VARIANTS[name].beside == step_size}
        tasks = [task for task in FEW if any(task in of_task for of_task in its.values())]
        if not its:
            continue
        yield f'\n## Beside `step_size="{step_size}"`\n'
        yield f"| option | {' | '.join(tasks)} | helps, hurts |"
        yield f"|---|{'--:|' * len(tasks)}---|"
        for name, of_task in its.items():
            verdicts = [change.verdict for change in of_task.values()]
            total = f"{verdicts.count('helps')}, {verdicts.count('hurts')}"
            cells = [shown(of_task[task]) if task in of_task else "" for task in tasks]
            yield f"| `{name.partition(': ')[2]}` | {' | '.join(cells)} | {total} |"


def shown(change: Change) -> str:
    """A change of the loss in percent: bold where it helps, in brackets where it counts as nothing."""
    percent = f"{100 * (change.ratio - 1):+.1f}".replace("-", "−")
    return {"helps": f"**{percent}**", "hurts": percent, "nothing": f"({percent})"}[change.verdict]


if __name__ == "__main__":
    command(__doc__, VARIANTS, report)
