"""Logistic regression on data sets that come with scikit-learn: problems whose optimum is known."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..task import Evaluation, Problem, Scale, Setup, Task

TRAINED_ON = 0.8
DECAY = 1e-3  # λ of λ/2 ‖w‖², which makes the optimum unique
ITERATIONS = 2000  # of L-BFGS, in float64; more than enough


def objective(model: nn.Linear, inputs: Tensor, labels: Tensor) -> Tensor:
    """The regularised mean cross entropy."""
    penalty = DECAY / 2 * (model.weight.square().sum() + model.bias.square().sum())
    return cross_entropy(model(inputs), labels) + penalty


def least(inputs: Tensor, labels: Tensor, classes: int) -> float:
    """The minimum of the objective."""
    model = nn.Linear(inputs.shape[1], classes, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=ITERATIONS,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(model, inputs.double(), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return objective(model, inputs.double(), labels).item()


def build(setup: Setup, *, loader: str) -> Problem:
    """A data set of scikit-learn, standardised and split by the seed."""
    import sklearn.datasets  # the only task that needs it

    features, targets = getattr(sklearn.datasets, loader)(return_X_y=True)
    inputs, labels = torch.from_numpy(features).double(), torch.from_numpy(targets).long()
    order = torch.randperm(len(inputs), generator=setup.generator(1))
    training, held_out = order.tensor_split([int(TRAINED_ON * len(inputs))])
    mean, deviation = inputs[training].mean(dim=0), inputs[training].std(dim=0)
    inputs = ((inputs - mean) / deviation.clamp_min(1e-6)).float()
    classes = int(labels.max()) + 1
    optimum = least(inputs[training], labels[training], classes)
    model = nn.Linear(inputs.shape[1], classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    model.to(setup.device)
    x, y = inputs[training].to(setup.device), labels[training].to(setup.device)
    test_x, test_y = inputs[held_out].to(setup.device), labels[held_out].to(setup.device)

    def loss(step: int) -> Tensor:
        batch = setup.draw(len(x), step)
        return objective(model, x[batch], y[batch])

    def evaluate() -> Evaluation:
        right = model(test_x).argmax(dim=1) == test_y
        # In float64, since the difference from the optimum may be small.
        double = nn.Linear(x.shape[1], classes, dtype=torch.float64, device=setup.device)
        double.load_state_dict(model.state_dict())
        return Evaluation(objective(double, x.double(), y).item() - optimum, right.float().mean().item())

    return Problem(model, loss, evaluate)


TASKS = tuple(
    Task(
        name,
        partial(build, loader=loader),
        {"small": Scale(2000, 32), "large": Scale(10_000, 32)},
        loss="training objective less its optimum",
        accuracy="held out",
        needs="sklearn",
    )
    for name, loader in (
        ("logistic-digits", "load_digits"),
        ("logistic-cancer", "load_breast_cancer"),
        ("logistic-wine", "load_wine"),
    )
)
