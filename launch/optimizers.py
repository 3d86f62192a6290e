"""The optimisers of the scripts: their options, parameters, numbers and averages."""

from __future__ import annotations

import argparse
import ast
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from options import LARGEST, rate
from torch import nn
from torch.optim import Optimizer

from prodigyplus import ProdigyPlusScheduleFree, muon_groups

LEARNING_RATES = {"prodigyplus": 1.0, "adamw": 1e-3}

# Options with which the step size is Prodigy's: its own, and what leaves Schedule-Free out.
OF_PRODIGY = {"use_schedulefree", "use_speed", "beta3", "beta4", "d_coef", "d_limiter", "slice_p"}

# The options that a resumed run must share with the run of its checkpoint.
SHARED = ("optimizer", "lr", "option", "muon")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose and configure the optimiser."""
    add = parser.add_argument
    add("--optimizer", choices=LEARNING_RATES, default="prodigyplus", help="default: %(default)s")
    add("--lr", type=rate, help="default: 1 for prodigyplus, which multiplies d with it; 0.001 for adamw")
    option_help = "of prodigyplus, as use_cautious=True; may be repeated; see docs/options.md"
    add("--muon", action="store_true", help="train hidden matrices by Muon; the rest as without")
    add("--option", type=option, action="append", default=[], metavar="NAME=VALUE", help=option_help)


def complete_(args: argparse.Namespace) -> None:
    """Fill in the default learning rate, and make the optimiser's options a dict.

    Raises:
        ValueError: The optimiser does not have the options given.
    """
    if args.muon and args.optimizer != "prodigyplus":
        raise ValueError("--muon: only --optimizer prodigyplus has it.")
    if args.option and args.optimizer != "prodigyplus":
        raise ValueError(f"--option {args.option[0][0]}=…: only --optimizer prodigyplus has options.")
    args.lr = LEARNING_RATES[args.optimizer] if args.lr is None else args.lr
    # A step size of its own for Muon's group, which one for all serves badly (docs/muon.md).
    args.option = ({"split_groups_mean": False} if args.muon else {}) | dict(args.option)


def prefer_balance_(args: argparse.Namespace) -> None:
    """Have balance find the step size, unless ``--option`` says ``step_size``, or one is Prodigy's."""
    if args.optimizer == "prodigyplus" and not OF_PRODIGY & args.option.keys():
        args.option = {"step_size": "balance", **args.option}


def option(text: str) -> tuple[str, Any]:
    """The name and the value of an option, from ``NAME=VALUE``."""
    name, _, value = text.partition("=")
    names = inspect.signature(ProdigyPlusScheduleFree).parameters.keys() - {"params", "lr"}
    if name not in names:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(sorted(names))}")
    try:
        parsed = ast.literal_eval(value)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # all that literal_eval raises
        parsed = value
    if isinstance(parsed, int) and abs(parsed) > LARGEST:
        raise argparse.ArgumentTypeError(f"{name}={value} is not between {-LARGEST} and {LARGEST}")
    # A checkpoint, with which it is compared, stores tuples as lists.
    return name, list(parsed) if isinstance(parsed, tuple) else parsed


def parameters(args: argparse.Namespace, model: nn.Module) -> list[Any]:
    """What to pass to prodigyplus: all parameters, or with ``--muon`` a group for Muon and another."""
    return muon_groups(model) if args.muon else list(model.parameters())


def scalars(optimizer: Optimizer) -> dict[str, float]:
    """The learning rate and, for prodigyplus, the step size and what it is made of, by name for the log."""
    numbers = {"lr": float(optimizer.param_groups[0]["lr"])}
    if isinstance(optimizer, ProdigyPlusScheduleFree):
        numbers |= optimizer.scalars(names=("d", "d_hat", "effective_lr", "step_size"))
    return numbers


def in_short(numbers: dict[str, float]) -> str:
    """Of :func:`scalars`, what a progress bar has room for: d, of each group, or without it the rate."""
    names = [name for name in numbers if name.partition("/")[0] == "d"] or ["lr"]
    return ", ".join(f"{name} {numbers[name]:.2e}" for name in names)


def averaged(optimizer: Optimizer) -> AbstractContextManager[None]:
    """A context in which the model holds its averaged weights; training is not affected."""
    if isinstance(optimizer, ProdigyPlusScheduleFree):
        return optimizer.averaged_parameters()
    return nullcontext()
