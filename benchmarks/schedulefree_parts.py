"""Parts of newer Schedule-Free methods with balance's step size, each switched on separately.

    PYTHONPATH=. python benchmarks/schedulefree_parts.py --out FILE [--tasks …] [--variants …] [--seeds …]
    PYTHONPATH=. python benchmarks/schedulefree_parts.py --out FILE --report

The first trains tasks of benchmarks/quality, and adds a line to the file for each run that it does not have.
The second prints a table, in which a change is nothing within 1 % or within twice that of `nudged`, the same
run begun at 1.1 times the step size. The optimiser is a plain one in this file, which keeps x, y and z. With
no part on, it makes the package's step (`package` and `package-muon` are runs of the package).
"""

from __future__ import annotations

import math
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
from quality.peers import Built, Setting
from quality.variants import Variant, changes, command

from prodigyplus.formulas import balance, moments, muon
from prodigyplus.formulas.directions import stable_scale

BETA1, BETA1_AT_END, BETA2, EPS, D0 = 0.9, 0.965, 0.99, 1e-8, 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is switched on. g is the gradient at y, γ the step size, P Adam's deviations, c = w/Σw.

    Attributes:
        momentum: μ of m ← μ m + (1−μ) g, corrected for its start; z steps by P⁻¹m instead of P⁻¹g
            (ScheduleFree+, arXiv 2605.19095). Muon orthogonalises m (SF-NorMuon, arXiv 2605.23061).
        evidence: Which ⟨g, u⟩ is in ρ: that of the step made, or of a plain one, without momentum.
        beta1, anneal: β of y = (1−β) z + β x; "run": log(1−β) goes linearly to that of 0.965 over the run
            (ScheduleFree+); "log": 1−β falls as k^−⅓ from step 100 on, for a run of unknown length.
        restarts: c = 1 once γ grows less than it may; until then (ScheduleFree+) there is no ⟨g, x − z⟩.
        power: r of w = k^r γ² (ScheduleFree+).
        decay, decay_by: λ of z ← z − λ γ y (Schedule-Free, arXiv 2405.15682); by 2, γ² replaces γ
            (AdamC, arXiv 2506.02285, and ScheduleFree+).
        muon: Whether hidden matrices have Muon's direction.
        rows: Divide it by the root of a second moment of each row, and scale it to an rms of 1 (SF-NorMuon).
        by_norm: Scale it to an rms of 1 by its norm, rather than by its shape.
        scale: What multiplies it besides; 0.2 in SF-NorMuon.
        one_d: Whether its group and Adam's have one step size, not one each.
        over: What ρ is a ratio of: weighted sums of the tensors' own, plain sums of ⟨g, x − z⟩ and ⟨g, u⟩
            over all elements, or of ⟨u, x − z⟩ and ⟨u, u⟩.
        target, growth, share, d0: Replace the package's.
    """

    beta1: float = BETA1
    momentum: float = 0.0
    evidence: Literal["made", "plain"] = "plain"
    anneal: Literal["", "run", "log"] = ""
    restarts: bool = False
    power: float = 0.0
    decay: float = 0.0
    decay_by: Literal[1, 2] = 1
    muon: bool = False
    rows: bool = False
    by_norm: bool = False
    scale: float = 1.0
    one_d: bool = False
    over: Literal["tensors", "elements", "directions"] = "tensors"
    target: float = balance.TARGET
    growth: float = balance.GROWTH
    share: float = balance.SHARE
    d0: float = D0

    def beta(self, k: int, steps: int) -> float:
        """β after step k of a run of ``steps`` steps."""
        if self.anneal == "run":
            return 1 - (1 - self.beta1) * math.pow((1 - BETA1_AT_END) / (1 - BETA1), min(1.0, k / steps))
        return 1 - (1 - self.beta1) * min(1.0, math.pow(100 / (k + 1), 1 / 3) if self.anneal else 1.0)


class Numbers:
    """The numbers of the groups that share one step size."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.k, self.is_growing = parts, 0, True
        self.d = torch.tensor([parts.d0], dtype=torch.float64)
        self.averages = balance.Averages(torch.zeros_like(self.d), torch.zeros_like(self.d))
        self.weight_sum = self.c = self.step = self.product = self.norm = 0.0

    def begin(self) -> None:
        """Count a step, and set its size and c."""
        self.k, self.step, self.product, self.norm = self.k + 1, float(self.d), 0.0, 0.0
        weight = self.k**self.parts.power * self.step**2
        self.weight_sum += weight
        self.c = weight / self.weight_sum

    def end(self) -> None:
        """Move d by the weighted sums of ρ, and of the weights."""
        now = balance.Averages(torch.full_like(self.d, self.product), self.d * self.norm)
        balance.TARGET, balance.GROWTH = self.parts.target, self.parts.growth  # no other optimiser is running
        self.d, _, self.averages = balance.next_d(self.d, torch.tensor([self.k]), self.averages, now)
        grown, limit = math.log(float(self.d) / self.step), min(balance.LOG_LIMIT, balance.GROWTH / self.k)
        if self.parts.restarts and self.is_growing and grown < limit - 1e-6:
            self.is_growing, self.weight_sum = False, 0.0


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-Free with balance's step size and parts, for a run of a given number of steps."""

    def __init__(self, groups: Sequence[dict[str, Any]], parts: Parts, steps: int) -> None:
        super().__init__(groups, {"lr": 1.0, "d": parts.d0, "muon": False})
        self.parts, self.steps, self.k = parts, steps, 0
        alone = [Numbers(parts) for _ in self.param_groups]
        self.numbers = alone[:1] * len(alone) if parts.one_d else alone
        self.all = [p for group in self.param_groups for p in group["params"]]
        for p in self.all:
            self.state[p] = {"x": p.detach().clone(), "z": p.detach().clone()}

    @torch.no_grad()
    def eval(self) -> None:
        """Put x into the model."""
        for p in self.all:
            self.state[p]["y"] = p.clone()
            p.copy_(self.state[p]["x"])

    @torch.no_grad()
    def train(self) -> None:
        """Put y back."""
        for p in self.all:
            p.copy_(self.state[p].pop("y", p))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take a step."""
        self.k += 1
        beta, apart = self.parts.beta(self.k, self.steps), set(self.numbers)
        for numbers in apart:
            numbers.begin()
        for group, numbers in zip(self.param_groups, self.numbers, strict=True):
            for p in (p for p in group["params"] if p.grad is not None):
                self._move(p, p.grad, numbers, beta, is_muon=group["muon"])
        for numbers in apart:
            numbers.end()
        for group, numbers in zip(self.param_groups, self.numbers, strict=True):
            group["d"] = float(numbers.d)

    def _move(self, p: Tensor, g: Tensor, n: Numbers, beta: float, *, is_muon: bool) -> None:
        """Move z, x and y, and add up ρ's sums."""
        state, parts = self.state[p], self.parts
        x, z, m = state["x"], state["z"], g
        if parts.momentum:
            m = state.setdefault("m", torch.zeros_like(g)).lerp_(g, 1 - parts.momentum)
            m = m / (1 - parts.momentum**self.k)
        direction = self._muon if is_muon else self._adam(g, state, n.step)
        u = direction(m, state)
        v = direction(g, {}) if parts.momentum and parts.evidence == "plain" else u
        by = v if parts.over == "directions" else g
        product, norm = (by * (x - z)).sum(), (by * v).sum()
        if parts.over == "tensors":
            numel = g.numel() ** (parts.share / balance.SHARE)
            product, norm = balance.evidence(product, norm, v.square().sum(), numel)
        n.product += float(product)
        n.norm += float(norm)
        if parts.decay:
            z.sub_(p, alpha=parts.decay * n.step**parts.decay_by)
        z.sub_(u, alpha=n.step)
        x.lerp_(z, n.c)
        p.copy_(torch.lerp(x, z, 1 - beta))

    def _adam(self, g: Tensor, state: dict[str, Tensor], d: float) -> Callable[..., Tensor]:
        """Adam's direction, with factored moments where the package has them, and StableAdamW's scale."""

        def average(name: str, value: Tensor) -> Tensor:
            kept = state.setdefault(name, torch.zeros_like(value))
            return kept.mul_(BETA2).add_(value, alpha=(1 - BETA2) * d * d)

        squares = g.square()
        if dims := moments.factored_dims(tuple(g.shape)):
            means = (squares.mean(over, keepdim=True) for over in (dims[1], dims[0], dims))
            row, column, mean = map(average, ("row", "column", "mean"), means)
            deviation = (row / (mean + 1e-30)).sqrt() * column.sqrt() / d
        else:
            deviation = average("V", squares).sqrt() / d

        def direction(m: Tensor, _: dict[str, Tensor]) -> Tensor:
            u = m / (deviation + EPS)
            return u * stable_scale(u.square().sum(), u.numel())

        return direction

    def _muon(self, m: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Muon's direction, in float32; an empty ``state`` is discarded afterwards."""
        if m.ndim > 2:  # a convolution
            return self._muon(m.flatten(1), state).view_as(m)
        u: Tensor = muon.newton_schulz(m.unsqueeze(0))[0]
        if self.parts.rows:
            of_rows = u.square().mean(1, keepdim=True)
            seen = state.setdefault("rows", torch.zeros_like(of_rows)).lerp_(of_rows, 1 - BETA2)
            u = u / (seen.sqrt() + EPS)
        if self.parts.rows or self.parts.by_norm:
            return u.div(torch.linalg.vector_norm(u) + EPS).mul(self.parts.scale * math.sqrt(u.numel()))
        u = u * muon.unit_rms(*u.shape)
        return u * (self.parts.scale * stable_scale(u.square().sum(), u.numel()))


def build(model: nn.Module, setting: Setting, steps: int, *, parts: Parts) -> Built:
    """The optimiser of a model."""
    hidden, rest = (
        peers.hidden_and_rest(model, convolutions=True) if parts.muon else ([], peers.trained(model))
    )
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": hidden, "muon": True}]
    return [ScheduleFree([group for group in groups if group["params"]], parts, steps)]


def _of(**parts: Any) -> Callable[..., Built]:
    return partial(build, parts=Parts(**parts))


VARIANTS = {
    "base": Variant(_of()),
    "nudged": Variant(_of(d0=1.1 * D0), "base", "nudged"),
    "elements": Variant(_of(over="elements"), "base", "nudged"),
    "directions": Variant(_of(over="directions"), "base", "nudged"),
    "share-0": Variant(_of(share=0), "base", "nudged"),
    "share-0.5": Variant(_of(share=0.5), "base", "nudged"),
    "share-1": Variant(_of(share=1), "base", "nudged"),
    "momentum": Variant(_of(momentum=0.9), "base", "nudged"),
    "momentum-made": Variant(_of(momentum=0.9, evidence="made"), "base", "nudged"),
    "beta-0.95": Variant(_of(beta1=0.95), "base", "nudged"),
    "anneal-run": Variant(_of(anneal="run"), "base", "nudged"),
    "anneal-log": Variant(_of(anneal="log"), "base", "nudged"),
    "restart": Variant(_of(restarts=True), "base", "nudged"),
    "power-1": Variant(_of(power=1), "base", "nudged"),
    "power-2": Variant(_of(power=2), "base", "nudged"),
    "decay": Variant(_of(decay=0.1), "base", "nudged"),
    "decay-squared": Variant(_of(decay=20, decay_by=2), "base", "nudged"),
    "growth-4": Variant(_of(growth=4, target=0.28), "base", "nudged"),
    "muon": Variant(_of(muon=True)),
    "muon-nudged": Variant(_of(muon=True, d0=1.1 * D0), "muon", "muon-nudged"),
    "muon-momentum-made": Variant(_of(muon=True, momentum=0.9, evidence="made"), "muon", "muon-nudged"),
    "muon-rows": Variant(_of(muon=True, rows=True), "muon", "muon-nudged"),
    "muon-by-norm": Variant(_of(muon=True, by_norm=True), "muon", "muon-nudged"),
    "muon-one-d": Variant(_of(muon=True, one_d=True), "muon", "muon-nudged"),
    "muon-one-d-0.2": Variant(_of(muon=True, one_d=True, scale=0.2), "muon", "muon-nudged"),
    "package": Variant(partial(peers.ours, step_size="balance"), "base", "nudged"),
    "package-muon": Variant(
        partial(peers.ours_muon, step_size="balance", split_groups_mean=False), "muon", "muon-nudged"
    ),
}


def report(rows: Iterable[results.Row]) -> Iterator[str]:
    """The table: each variant and what it is compared with, on the seeds that both have."""
    yield "| part | task | without | with | change | nudged | seeds | |\n|---|---|--:|--:|--:|--:|--:|---|"
    for name, of_task in changes(rows, VARIANTS).items():
        for task, its in of_task.items():
            figures = [f"{its.before:.4g}", f"{its.after:.4g}", f"{its.ratio - 1:+.1%}"]
            figures += [f"±{its.noise:.1%}" if its.noise else "", str(its.seeds), its.verdict]
            yield f"| {' | '.join([name, task, *figures])} |"


if __name__ == "__main__":
    command(__doc__, VARIANTS, report)
