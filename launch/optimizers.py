"""The optimisers that the scripts offer, and what they know of them."""

from __future__ import annotations

import argparse
import ast
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from options import LARGEST, rate
from report import Curve, Panel
from torch import nn
from torch.optim import Optimizer

from prodigyplus import ProdigyPlusScheduleFree, muon_groups

LEARNING_RATES = {"prodigyplus": 1.0, "adamw": 1e-3}

# What a checkpoint of another run must share with a run that goes on with it.
SHARED = ("optimizer", "lr", "option", "muon")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which optimiser to take, and how."""
    add = parser.add_argument
    add("--optimizer", choices=LEARNING_RATES, default="prodigyplus", help="default: %(default)s")
    add("--lr", type=rate, help="default: 1 for prodigyplus, which multiplies d with it; 0.001 for adamw")
    option_help = "of prodigyplus, as use_cautious=True; may be repeated; see docs/options.md"
    add("--muon", action="store_true", help="train hidden matrices by Muon; the rest as without")
    add("--option", type=option, action="append", default=[], metavar="NAME=VALUE", help=option_help)


def complete(args: argparse.Namespace) -> None:
    """Put the learning rate that was not given into parsed arguments, and make the options a dict.

    Raises:
        ValueError: There are options, and the optimiser has none.
    """
    if args.muon and args.optimizer != "prodigyplus":
        raise ValueError("--muon: only --optimizer prodigyplus has it.")
    if args.option and args.optimizer != "prodigyplus":
        raise ValueError(f"--option {args.option[0][0]}=…: only --optimizer prodigyplus has options.")
    args.lr = LEARNING_RATES[args.optimizer] if args.lr is None else args.lr
    args.option = dict(args.option)


def option(text: str) -> tuple[str, Any]:
    """An option and its value, from ``NAME=VALUE``."""
    name, _, value = text.partition("=")
    names = inspect.signature(ProdigyPlusScheduleFree).parameters.keys() - {"params", "lr"}
    if name not in names:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(sorted(names))}")
    try:
        read = ast.literal_eval(value)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # all that literal_eval raises
        read = value
    if isinstance(read, int) and abs(read) > LARGEST:
        raise argparse.ArgumentTypeError(f"{name}={value} is not between {-LARGEST} and {LARGEST}")
    # A checkpoint, which this is compared with, has lists for tuples.
    return name, list(read) if isinstance(read, tuple) else read


def parameters(args: argparse.Namespace, model: nn.Module) -> list[Any]:
    """What to give to prodigyplus: all parameters, or those for Muon and the others apart."""
    return muon_groups(model) if args.muon else list(model.parameters())


def step_size(optimizer: Optimizer) -> dict[str, float]:
    """How far the optimiser goes now."""
    numbers = {"lr": float(optimizer.param_groups[0]["lr"])}
    if isinstance(optimizer, ProdigyPlusScheduleFree):
        first, *others = optimizer.metrics()
        numbers |= {name: first[name].item() for name in ("d", "d_hat", "effective_lr", "step_size")}
        numbers |= {f"d_{number}": other["d"].item() for number, other in enumerate(others, 1)}
    return numbers


def averaged(optimizer: Optimizer) -> AbstractContextManager[None]:
    """The model with the weights to evaluate; training goes on as if nothing had been."""
    if isinstance(optimizer, ProdigyPlusScheduleFree):
        return optimizer.averaged_parameters()
    return nullcontext()


def panels(args: argparse.Namespace) -> list[Panel]:
    """What there is to draw of the optimiser."""
    if args.optimizer != "prodigyplus":
        return []
    curves = [Curve("train", "d", "Muon"), Curve("train", "d_1", "elementwise")]
    return [Panel("step size d", tuple(curves if args.muon else curves[:1]), "log")]
