"""Parts of newer Schedule-Free methods beside balance's step size, each switched on by itself.

    PYTHONPATH=. python benchmarks/schedulefree_parts.py --out docs/research/parts.jsonl \
        [--tasks NAME ...] [--variants NAME ...] [--seeds N ...]
    PYTHONPATH=. python benchmarks/schedulefree_parts.py --out docs/research/parts.jsonl --report

The first trains the tasks of benchmarks/quality, and adds a JSON line to the file for each run; it is
resumable. The second prints a table of what is in the file. The optimiser is a plain one of this file. It
keeps x, y and z, and with no part on it makes the step of the package (`package` and `package-muon` are runs
of that one). `nudged` is the same run begun at 1.1 times the step size: what it changes is noise.

A part's formula, and where it is from, is at the field of `Parts` that switches it on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import peers, results
from quality.peers import Built, Entry, Setting
from quality.run import environment
from quality.task import Setup
from quality.tasks import TASKS
from quality.train import train

from prodigyplus.formulas import balance, moments, muon
from prodigyplus.formulas.directions import stable_scale

BETA1, BETA2, EPS, D0 = 0.9, 0.99, 1e-8, 1e-6
FASTEST = ("tanh-regression", "logistic-digits", "mnist-mlp", "gpt-w64-b8", "noisy-mnist", "rotated-mnist")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is switched on; with g the gradient at y, γ the step size, P Adam's deviations, c = w/Σw.

    Attributes:
        beta1: β of y = (1−β) z + β x.
        momentum: μ of m ← μ m + (1−μ) g, corrected for its start; z steps by P⁻¹m in the place of P⁻¹g
            (ScheduleFree+, arXiv 2605.19095). With Muon it is orthogonalised (SF-NorMuon, 2605.23061).
        evidence: Of which step ⟨g, u⟩ in ρ is: "made", the one with momentum; "plain", that of g without
            momentum; "first", the one made over the weight that g has in m.
        anneal: "run": log(1−β) goes linearly to that of 0.965 over the run (ScheduleFree+); "log": 1−β falls
            as k^−⅓ from step 100 on, for a run of unknown length.
        restarts: x ← z at the first step at which γ grows less than it may, as c = 1 until then would have it
            (ScheduleFree+'s c_warmup), without which there is no ⟨g, x − z⟩.
        power: r of w = k^r γ² (ScheduleFree+).
        sharpness: C of c = min(1, (1−β) C w/Σw) (2507.09846), the package's `schedulefree_c`; 0 is without.
        decay, decay_at, decay_by: λ of z ← z − λ γ v; v is y (Schedule-Free, 2405.15682) or z (SF-NorMuon),
            and γ² in the place of γ is AdamC's (2506.02285).
        muon: Whether hidden matrices have Muon's direction, by a step size of their own.
        rows: Whether it is divided by the root of a second moment of each row (SF-NorMuon), then scaled to an
            rms of 1.
        by_norm: Whether it is scaled to an rms of 1 by its norm, rather than by its shape.
        scale: What it is scaled with besides; 0.2 in SF-NorMuon.
        one_d: Whether both groups have one step size.
        target, growth: In the place of balance's.
        d0: The first step size.
    """

    beta1: float = BETA1
    momentum: float = 0.0
    evidence: Literal["made", "plain", "first"] = "plain"
    anneal: Literal["", "run", "log"] = ""
    restarts: bool = False
    power: float = 0.0
    sharpness: float = 0.0
    decay: float = 0.0
    decay_at: Literal["y", "z"] = "y"
    decay_by: Literal[1, 2] = 1
    muon: bool = False
    rows: bool = False
    by_norm: bool = False
    scale: float = 1.0
    one_d: bool = False
    target: float = balance.TARGET
    growth: float = balance.GROWTH
    d0: float = D0

    def beta(self, k: int, steps: int) -> float:
        """β of step k, from 1, of a run of so many steps."""
        if self.anneal == "run":
            return 1 - (1 - self.beta1) * (0.035 / 0.1) ** min(1.0, (k - 1) / steps)
        return 1 - (1 - self.beta1) * min(1.0, (100 / k) ** (1 / 3)) if self.anneal == "log" else self.beta1


class Group:
    """The numbers of parameters with one step size, and the step of their z and x."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.k, self.is_growing = parts, 0, True
        self.d = torch.tensor([parts.d0], dtype=torch.float64)
        self.averages = balance.Averages(torch.zeros_like(self.d), torch.zeros_like(self.d))
        self.weight_sum = 0.0

    def weight(self, beta: float) -> float:
        """Count a step, and return its c."""
        self.k += 1
        weight = self.k**self.parts.power * float(self.d) ** 2
        self.weight_sum += weight
        c = weight / self.weight_sum
        return min(1.0, c * (1 - beta) * self.parts.sharpness) if self.parts.sharpness else c

    def adapt(self, product: float, norm: float) -> bool:
        """Move d by the sums of ⟨g, x − z⟩ and ⟨g, u⟩; returns whether x is to be z."""
        now = balance.Averages(torch.full_like(self.d, product), self.d * norm)
        before, parts = self.d, self.parts
        balance.TARGET, balance.GROWTH = parts.target, parts.growth  # no other optimiser is at work
        self.d, _, self.averages = balance.next_d(self.d, torch.tensor([self.k]), self.averages, now)
        limit = min(balance.LOG_LIMIT, parts.growth / self.k)
        was_growing, self.is_growing = (
            self.is_growing,
            self.is_growing and float((self.d / before).log()) > limit - 1e-6,
        )
        if parts.restarts and was_growing and not self.is_growing:
            self.weight_sum = 0.0
            return True
        return False


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-Free with balance's step size and parts; holds x, y and z, and has a run of known length."""

    def __init__(self, groups: Sequence[dict[str, Any]], parts: Parts, steps: int) -> None:
        super().__init__(groups, {"lr": 1.0, "d": parts.d0, "muon": False})
        self.parts, self.steps, self.k = parts, steps, 0
        numbers = [Group(parts) for _ in self.param_groups]
        self.numbers = numbers[:1] * len(numbers) if parts.one_d else numbers
        for p in self._all():
            self.state[p] = {"x": p.detach().clone(), "z": p.detach().clone()}

    def _all(self) -> Iterator[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def eval(self) -> None:
        """Put x into the model."""
        for p in self._all():
            self.state[p]["y"] = p.clone()
            p.copy_(self.state[p]["x"])

    @torch.no_grad()
    def train(self) -> None:
        """Put y back."""
        for p in self._all():
            if "y" in self.state[p]:
                p.copy_(self.state[p].pop("y"))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take a step."""
        self.k += 1
        beta, after = (self.parts.beta(k, self.steps) for k in (self.k, self.k + 1))
        sums = {id(numbers): [0.0, 0.0] for numbers in self.numbers}
        weights = {id(numbers): (numbers.weight(beta), float(numbers.d)) for numbers in set(self.numbers)}
        for group, numbers in zip(self.param_groups, self.numbers, strict=True):
            c, d = weights[id(numbers)]
            for p in group["params"]:
                if p.grad is not None:
                    evidence = self._move(p, p.grad, d, c, after, is_muon=group["muon"])
                    for index, value in enumerate(evidence):
                        sums[id(numbers)][index] += value
        restarting = {id(numbers) for numbers in set(self.numbers) if numbers.adapt(*sums[id(numbers)])}
        for group, numbers in zip(self.param_groups, self.numbers, strict=True):
            group["d"] = float(numbers.d)
            for p in group["params"] if id(numbers) in restarting else ():
                self.state[p]["x"].copy_(self.state[p]["z"])
                p.copy_(self.state[p]["z"])

    def _move(
        self, p: Tensor, g: Tensor, d: float, c: float, beta: float, *, is_muon: bool
    ) -> tuple[float, float]:
        """Move z, x and y; returns ⟨g, x − z⟩ and ⟨g, u⟩."""
        state, parts = self.state[p], self.parts
        x, z = state["x"], state["z"]
        share, m = 1.0, g
        if parts.momentum:
            m = state.setdefault("m", torch.zeros_like(g)).lerp_(g, 1 - parts.momentum)
            correction = 1 - parts.momentum**self.k
            m, share = m / correction, (1 - parts.momentum) / correction
        direction = self._muon if is_muon else self._adam(g, state, d)
        u = direction(m, state)
        product = float((g * (x - z)).sum())
        if parts.evidence == "plain" and parts.momentum:
            norm = float((g * direction(g, {})).sum())
        else:
            norm = float((g * u).sum()) / (share if parts.evidence == "first" else 1.0)
        if parts.decay:
            z.sub_((p if parts.decay_at == "y" else z) * (parts.decay * d**parts.decay_by))
        z.sub_(u, alpha=d)
        x.lerp_(z, c)
        p.copy_(torch.lerp(x, z, 1 - beta))
        return product, norm

    def _adam(self, g: Tensor, state: dict[str, Tensor], d: float) -> Callable[..., Tensor]:
        """The direction of Adam with factored moments, and StableAdamW's scale."""
        dims = moments.factored_dims(tuple(g.shape))
        squares = g.square()
        if dims is None:
            deviation = _average(state, "V", squares, d).sqrt() / d
        else:
            row, column = dims
            rows, columns, mean = (
                _average(state, str(over), squares.mean(over, keepdim=True), d)
                for over in (column, row, dims)
            )
            deviation = (rows / (mean + 1e-30)).sqrt() * columns.sqrt() / d

        def direction(m: Tensor, _: dict[str, Tensor]) -> Tensor:
            u = m / (deviation + EPS)
            return u * stable_scale(u.square().sum(), u.numel())

        return direction

    def _muon(self, m: Tensor, state: dict[str, Tensor]) -> Tensor:
        """That of Muon, in float32; without ``state``, that of a step apart from the run."""
        parts = self.parts
        u = muon.newton_schulz(m.unsqueeze(0))[0]
        if parts.rows:
            of_rows = u.square().mean(1, keepdim=True)
            seen = state.setdefault("rows", torch.zeros_like(of_rows)).lerp_(of_rows, 1 - BETA2)
            u = u / ((seen / (1 - BETA2**self.k) if "x" in state else of_rows).sqrt() + EPS)
        if parts.rows or parts.by_norm:
            return u * (parts.scale * math.sqrt(u.numel()) / (u.norm() + EPS))
        u = u * muon.unit_rms(*u.shape)
        return u * (parts.scale * stable_scale(u.square().sum(), u.numel()))


def _average(state: dict[str, Tensor], name: str, squares: Tensor, d: float) -> Tensor:
    """The second moment of d·g, by that of g."""
    return (
        state.setdefault(name, torch.zeros_like(squares)).mul_(BETA2).add_(squares, alpha=(1 - BETA2) * d * d)
    )


def build(model: nn.Module, setting: Setting, steps: int, *, parts: Parts) -> Built:
    """The optimiser of a model."""
    if not parts.muon:
        return [ScheduleFree([{"params": peers.trained(model)}], parts, steps)]
    hidden, rest = peers.hidden_and_rest(model)
    groups = [{"params": rest}, {"params": hidden, "muon": True}]
    return [ScheduleFree([group for group in groups if group["params"]], parts, steps)]


def package_muon(model: nn.Module, setting: Setting, steps: int) -> Built:
    """The package's, with Muon in float32."""
    options = {"step_size": "balance", "split_groups_mean": False, "muon_fp32": True}
    return peers.ours_muon(model, setting, steps, **options)


# Each with what it is compared with; None for what others are compared with.
VARIANTS: dict[str, tuple[str | None, Parts]] = {
    "base": (None, Parts()),
    "nudged": ("base", Parts(d0=1.1 * D0)),
    "momentum": ("base", Parts(momentum=0.9)),
    "momentum-made": ("base", Parts(momentum=0.9, evidence="made")),
    "momentum-first": ("base", Parts(momentum=0.9, evidence="first")),
    "momentum-0.5": ("base", Parts(momentum=0.5)),
    "beta-0.95": ("base", Parts(beta1=0.95)),
    "anneal-run": ("base", Parts(anneal="run")),
    "anneal-log": ("base", Parts(anneal="log")),
    "restart": ("base", Parts(restarts=True)),
    "power-1": ("base", Parts(power=1)),
    "power-2": ("base", Parts(power=2)),
    "power-4": ("base", Parts(power=4)),
    "sharpness-30": ("base", Parts(sharpness=30)),
    "decay": ("base", Parts(decay=0.1)),
    "decay-z": ("base", Parts(decay=0.1, decay_at="z")),
    "decay-squared": ("base", Parts(decay=20, decay_by=2)),
    "decay-squared-z": ("base", Parts(decay=20, decay_at="z", decay_by=2)),
    "target-0.2": ("base", Parts(target=0.2)),
    "target-0.3": ("base", Parts(target=0.3)),
    "growth-4": ("base", Parts(growth=4, target=0.28)),
    "muon": (None, Parts(muon=True)),
    "muon-nudged": ("muon", Parts(muon=True, d0=1.1 * D0)),
    "muon-momentum": ("muon", Parts(muon=True, momentum=0.9)),
    "muon-momentum-made": ("muon", Parts(muon=True, momentum=0.9, evidence="made")),
    "muon-momentum-first": ("muon", Parts(muon=True, momentum=0.9, evidence="first")),
    "muon-rows": ("muon", Parts(muon=True, rows=True)),
    "muon-by-norm": ("muon", Parts(muon=True, by_norm=True)),
    "muon-one-d": ("muon", Parts(muon=True, one_d=True)),
    "muon-one-d-0.2": ("muon", Parts(muon=True, one_d=True, scale=0.2)),
    "muon-power-2": ("muon", Parts(muon=True, power=2)),
}
PACKAGE = {
    "package": ("base", partial(peers.ours, step_size="balance")),
    "package-muon": ("muon", package_muon),
}


def entry_of(name: str) -> Entry:
    """What a variant is for the training loop."""
    built = PACKAGE[name][1] if name in PACKAGE else partial(build, parts=VARIANTS[name][1])
    return Entry(name, built, tuned="nothing", distribution="")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is left to do, or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, names = parser.add_argument, [*VARIANTS, *PACKAGE]
    add("--out", type=Path, required=True, metavar="FILE.jsonl")
    add("--tasks", nargs="+", choices=TASKS, default=FASTEST, metavar="NAME")
    add("--variants", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--seeds", nargs="+", type=int, default=[1], metavar="N")
    add("--report", action="store_true")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    done = results.read([args.out])
    if args.report:
        print("\n".join(report(done.values())))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.tasks:
            for variant in args.variants:
                run(args.out, done, name, variant, seed)


def run(out: Path, done: dict[str, results.Row], task: str, variant: str, seed: int) -> None:
    """One run, if it is not done already."""
    scale, entry = TASKS[task].scales["small"], entry_of(variant)
    identity = results.identity(task, "small", scale, entry, Setting(), seed, "cpu")
    if (key := results.key(identity)) in done:
        return
    setup = Setup(scale, seed, torch.device("cpu"), Path("runs/quality"))
    row = {**identity, **train(TASKS[task], setup, entry, Setting()), "environment": environment("cpu")}
    results.append(out, row)
    done[key] = row
    print(f"{task}, {variant}, seed {seed}: {row['loss']}, {row['cpu_seconds']} s of the CPU", flush=True)


def report(rows: Iterable[results.Row]) -> Iterator[str]:
    """The table: each variant beside what it is compared with, on the seeds that both have."""
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        loss = math.inf if row["loss"] is None else row["loss"]
        losses.setdefault((row["optimizer"], row["task"]), {})[row["seed"]] = loss
    tasks = sorted({task for _, task in losses}, key=list(TASKS).index)
    against = {name: beside for name, (beside, _) in (*VARIANTS.items(), *PACKAGE.items()) if beside}
    noise = {}
    for base, nudged in (("base", "nudged"), ("muon", "muon-nudged")):
        for task in tasks:
            pairs = paired(losses, nudged, base, task)
            logs = [math.log(new / old) ** 2 for new, old in pairs.values()]
            noise[base, task] = math.sqrt(statistics.fmean(logs)) if logs else math.nan
    yield "| part | task | without | with | change | noise | seeds |\n|---|---|--:|--:|--:|--:|--:|"
    for name, beside in against.items():
        for task in tasks:
            if pairs := paired(losses, name, beside, task):
                new, old = (statistics.fmean(values) for values in zip(*pairs.values(), strict=True))
                change = statistics.fmean(math.log(a / b) for a, b in pairs.values())
                figures = f"{old:.4g} | {new:.4g} | {math.expm1(change):+.1%} | {noise[beside, task]:.1%}"
                yield f"| {name} | {task} | {figures} | {len(pairs)} |"


def paired(
    losses: dict[tuple[str, str], dict[int, float]], name: str, beside: str, task: str
) -> dict[int, tuple[float, float]]:
    """The losses of two variants, of the seeds that both have."""
    new, old = losses.get((name, task), {}), losses.get((beside, task), {})
    return {seed: (new[seed], old[seed]) for seed in sorted(new.keys() & old.keys())}


if __name__ == "__main__":
    main()
