"""Weights that a training loop changes between steps, and the same with ``optimizer.constrain``.

    pip install prodigyopt schedulefree
    python benchmarks/constraints.py

Three cases from public code: a logit scale that is clamped, an embedding with ``max_norm``, and rows that are
renormalised after each step. For each optimiser it prints the loss at the training weights and at the
evaluated ones, how far the latter are outside the set, and d.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from harness.peers import OURS, load
from harness.tables import head, parser, row
from torch import Tensor, nn
from torch.nn import functional

Make = Callable[[Iterable[Tensor]], Any]


class Task(NamedTuple):
    """A problem with a constraint.

    Args:
        model: What is trained.
        loss: The loss on all data, or on a step's batch.
        held: The parameter that the constraint holds.
        project: Projects weights onto the set, in place.
        steps: How many to train for.
        d0: Where Prodigy starts.
    """

    model: nn.Module
    loss: Callable[[int | None], Tensor]
    held: Tensor
    project: Callable[[Tensor], Tensor]
    steps: int
    d0: float


class Clip(nn.Module):
    """Two encoders and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(2)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u, v = (functional.normalize(f(t), dim=-1) for f, t in zip(self.encoders, (x, y), strict=True))
        return self.logit_scale.exp() * u @ v.t()


def clip() -> Task:
    """A contrastive loss whose logit scale is clamped to log 100, as CLIP's is."""
    torch.manual_seed(0)
    latent = torch.randn(512, 8)
    x, y = (latent @ torch.randn(8, 32) + 0.05 * torch.randn(512, 32) for _ in range(2))
    model, draws = Clip(), torch.Generator().manual_seed(1)

    def loss(step: int | None) -> Tensor:
        chosen = torch.arange(512) if step is None else torch.randperm(512, generator=draws)[:128]
        logits, target = model(x[chosen], y[chosen]), torch.arange(len(chosen))
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.t(), target)) / 2

    return Task(model, loss, model.logit_scale, lambda w: w.clamp_(0, math.log(100)), 3000, 1e-6)


def embedding() -> Task:
    """Word vectors of norm 1 at most."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 40))
    centre, context = torch.randint(0, 40, (256,)), torch.randint(0, 40, (256,))
    context = torch.where(torch.rand(256) < 0.8, (centre * 7 + 3) % 40, context)

    def loss(_: int | None) -> Tensor:
        return functional.cross_entropy(model(centre), context)

    words: Any = model[0]
    return Task(model, loss, words.weight, lambda w: w.copy_(torch.renorm(w, 2, 0, 1.0)), 300, 1e-3)


def rows() -> Task:
    """A cosine classifier, whose rows are kept at norm 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 10, bias=False))
    data = torch.randn(512, 20)
    labels = (data @ torch.randn(20, 10)).argmax(1)

    def loss(_: int | None) -> Tensor:
        hidden = functional.normalize(model[:2](data), dim=-1)
        return functional.cross_entropy(16 * model[2](hidden), labels)

    last: Any = model[2]
    task = Task(model, loss, last.weight, lambda w: w.div_(w.norm(dim=1, keepdim=True)), 600, 1e-6)
    with torch.no_grad():
        task.project(task.held)
    return task


class Result(NamedTuple):
    """The results of a run."""

    trained: float
    evaluated: float
    outside: float
    d: float | None  # None: the optimiser finds none


def run(make_task: Callable[[], Task], make: Make, *, constrain: bool) -> Result:
    """Train, with the weights changed after each step, or by ``constrain``."""
    task = make_task()
    optimizer = make(task.model.parameters())
    getattr(optimizer, "train", lambda: None)()
    if constrain:
        optimizer.constrain(task.held, task.project)
    for step in range(task.steps):
        optimizer.zero_grad()
        task.loss(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not constrain:
            with torch.no_grad():
                task.project(task.held)
    with torch.no_grad():
        trained = task.loss(None).item()
        getattr(optimizer, "eval", lambda: None)()
        evaluated = task.loss(None).item()
        outside = (task.project(task.held.clone()) - task.held).abs().max().item()
    d = optimizer.param_groups[0].get("d")
    return Result(trained, evaluated, outside, None if d is None else float(d))


def main() -> None:
    """Print a table."""
    parser(__doc__).parse_args()
    torch.set_num_threads(1)
    print(head("task | optimiser | constraint | loss in training: | evaluated: | outside the set: | d:"))
    for make_task in (clip, embedding, rows):
        d0 = make_task().d0
        makes: tuple[tuple[str, str, dict[str, Any], bool], ...] = (
            ("ours", OURS, {"d0": d0}, False),
            ("ours", OURS, {"d0": d0}, True),
            ("ours, balance", OURS, {"step_size": "balance"}, False),
            ("ours, balance", OURS, {"step_size": "balance"}, True),
            ("prodigyopt", "prodigyopt:Prodigy", {"d0": d0}, False),
            ("schedulefree", "schedulefree:AdamWScheduleFree", {"lr": 2.5e-3}, False),
            ("AdamW", "torch.optim:AdamW", {"lr": 1e-3}, False),
        )
        for name, place, options, constrain in makes:
            r = run(make_task, functools.partial(load(place), **options), constrain=constrain)
            how = "`constrain`" if constrain else "after each step"
            d = "–" if r.d is None else f"{r.d:.2g}"
            losses = f"{r.trained:.4g}", f"{r.evaluated:.4g}"
            print(row(make_task.__name__, name, how, *losses, f"{r.outside:.2g}", d), flush=True)


if __name__ == "__main__":
    main()
