"""Whether two checkouts compute the same, to the bit: every option, on one process and on several.

    python benchmarks/same_bits.py --old CHECKOUT [--new CHECKOUT] [--only PATTERN] [--without-compile]

For each checkout it starts itself in processes that import the packages from there, plays every case for a
few steps, and hashes everything that a user can see: weights after every step, averaged weights, the state
dict, metrics. Then it prints a line for each case that differs, with what differs first and by how much, and
how many cases are the same. Its exit status is 1 if any case differs or raises. ``--new`` is by default the
checkout that this file is in; PATTERN is a regular expression that is searched for in the names of cases;
``--list`` prints them.

Only public names are used, so that internals may change. Weights and gradients are made from integers. Within
a case, a gradient has a NaN, a parameter has no gradient, the average is evaluated, and the optimiser is
saved and loaded into a new one.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from harness import ROOT
from harness.tables import parser
from harness.workers import WorkerError, on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn.parallel import DistributedDataParallel

import option_table as table  # isort: skip  # of this checkout: harness knows where

if TYPE_CHECKING:  # the process that starts the others runs even if a checkout does not
    from prodigyplus import ProdigyPlusScheduleFree

LONGEST = 1200  # seconds, for the processes of one checkout
BROKEN = 3  # the exit status of a process that has failed within a case

SHAPES = ((48, 33), (48, 33), (60,), (60,), (), (12, 4, 3, 5), (0, 7), (40, 1, 37), (300, 260))
SMALL_SHAPES = ((16, 11), (16, 11), (20,), (20,), (), (6, 4, 3, 5), (0, 7), (10, 1, 9), (35, 24))
LARGE_SHAPES = ((400, 400), (400, 400), (131, 1030), (30,))  # too large to be moved as one
COMPILED_SHAPES = ((48, 33), (48, 33), (60,), (60,), (), (12, 4, 3, 5))

FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64
WIDTHS = {FLOAT32: "float32", BFLOAT16: "bfloat16", FLOAT64: "float64"}

STEPS = 7
NAN_AT, MISSING_AT, EVAL_AFTER, RELOAD_AFTER = 2, 3, 3, 4

Options = Mapping[str, Any]
Shapes = Sequence[tuple[int, ...]]

# ------------------------------------------------------------------------------------------ what is recorded


@dataclass
class Record:
    """What a case shows: the hash of each value by its name, in order, and the tensors of some."""

    hashes: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def note(self, what: str, value: Any, *, keep: bool = False) -> None:
        """Record a value: tensors by their bytes, dicts and lists entry by entry, others by their text."""
        if isinstance(value, Mapping):
            for key in value:
                self.note(f"{what}.{key}", value[key], keep=keep)
        elif isinstance(value, list):
            for number, entry in enumerate(value):
                self.note(f"{what}.{number}", entry, keep=keep)
        elif isinstance(value, DTensor):
            self.note(f"{what}:placements", f"{value.placements} {tuple(value.shape)}")
            self.note(what, value.to_local(), keep=keep)
        elif isinstance(value, Tensor):
            value = value.detach()
            about = f"{value.dtype} {tuple(value.shape)} {value.device}".encode()
            self.hashes[what] = hashlib.sha256(about + bytes_of(value)).hexdigest()
            if keep:
                self.tensors[what] = value.clone()
        else:
            self.hashes[what] = hashlib.sha256(repr(value).encode()).hexdigest()
            if isinstance(value, (int, float)):
                self.tensors[what] = torch.tensor(value, dtype=FLOAT64)


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of the elements of a tensor, in their order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ------------------------------------------------------------------------------------------ inputs


@functools.lru_cache(maxsize=512)
def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers in [-1, 1) that float32 holds exactly, from a hash of integers. Never change them."""
    bits = torch.arange(torch.Size(shape).numel(), dtype=torch.int64).add_(seed * 0x9E3779B1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    bits ^= bits >> 16
    return ((bits & 0xFFFFFF).to(FLOAT32) / (1 << 23) - 1).reshape(shape)


def weight(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The first weights of a parameter."""
    return drawn(shape, 1 + number).to(dtype, copy=True)


def gradient(number: int, shape: tuple[int, ...], step: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a parameter at a step; its mean is not 0, so that Prodigy sees progress."""
    grad = ((drawn(shape, 1000 * (step + 1) + number) + 0.625) * 0.125).to(dtype)
    if step == NAN_AT and number == 0 and grad.numel():
        grad.view(-1)[-1] = torch.nan
    return grad


def is_missing(number: int, step: int) -> bool:
    """Whether a parameter has no gradient at a step."""
    return step == MISSING_AT and number == 1


class Held(nn.Module):
    """A model of nothing but parameters, whose gradients are given."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)

    def forward(self, grads: Sequence[Tensor | None]) -> Tensor:
        terms = [(p * grad).sum() for p, grad in zip(self.weights, grads, strict=True) if grad is not None]
        return torch.stack([term.to(FLOAT32) for term in terms]).sum()


# ------------------------------------------------------------------------------------------ how it is played

Place = Callable[[int, Tensor], Tensor]
Make = Callable[[nn.Module, list[nn.Parameter], int], "ProdigyPlusScheduleFree"]
Between = Callable[[int, "ProdigyPlusScheduleFree", list[nn.Parameter]], None]


def as_it_is(number: int, tensor: Tensor) -> Tensor:
    """A parameter of one process."""
    return tensor


@dataclass(frozen=True, kw_only=True)
class Play:
    """Some steps on parameters whose gradients are given.

    Args:
        make: Makes the optimiser of a model, its parameters, and the number of its first step.
        place: Puts a tensor where its parameter, by its number, is to be.
        between: Called before each step, with its number.
        lacks: Whether a parameter, by its number, has no gradient at a step.
        in_eval: Whether the optimiser is saved and loaded in eval mode.
        in_backward: Whether gradients come from a backward pass, for steps that are fused with it.
    """

    make: Make
    shapes: Shapes = SHAPES
    dtype: torch.dtype = FLOAT32
    place: Place = as_it_is
    between: Between | None = None
    lacks: Callable[[int, int], bool] = is_missing
    steps: int = STEPS
    in_eval: bool = False
    in_backward: bool = False
    grad_dtype: torch.dtype | None = None

    def __call__(self, record: Record) -> None:
        """Play it, and record what it shows."""
        weights = (weight(number, shape, self.dtype) for number, shape in enumerate(self.shapes))
        parameters = [nn.Parameter(self.place(number, tensor)) for number, tensor in enumerate(weights)]
        model = Held(parameters)
        optimizer = self.make(model, parameters, 0)
        for step in range(self.steps):
            if self.between is not None:
                self.between(step, optimizer, parameters)
            self.feed(model, parameters, step)
            optimizer.step()
            optimizer.zero_grad()
            record.note(f"step {step}: weights", [p.detach() for p in parameters])
            record.note(f"step {step}: metrics", optimizer.metrics(), keep=step == EVAL_AFTER)
            if step == EVAL_AFTER:
                optimizer.eval()
                record.note("in eval", [p.detach() for p in parameters])
                optimizer.train()
                record.note("in train again", [p.detach() for p in parameters])
            if step == RELOAD_AFTER:
                model, parameters, optimizer = self.reloaded(record, optimizer, parameters, step)
        note_end(record, model, optimizer)

    def feed(self, model: nn.Module, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Give the parameters their gradients of a step."""
        grads = [
            None
            if self.lacks(number, step) or not p.requires_grad
            else self.place(number, gradient(number, tuple(p.shape), step, self.grad_dtype or p.dtype))
            for number, p in enumerate(parameters)
        ]
        if self.in_backward:
            model(grads).backward()
            return
        for p, grad in zip(parameters, grads, strict=True):
            if self.grad_dtype is not None:
                p.grad_dtype = self.grad_dtype
            p.grad = grad

    def reloaded(
        self, record: Record, optimizer: ProdigyPlusScheduleFree, parameters: list[nn.Parameter], step: int
    ) -> tuple[Held, list[nn.Parameter], ProdigyPlusScheduleFree]:
        """A new model and optimiser in the same state, by way of a state dict."""
        if self.in_eval:
            optimizer.eval()
        saved = copy.deepcopy(optimizer.state_dict())
        record.note("saved", saved)
        parameters = [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in parameters]
        model = Held(parameters)
        optimizer = self.make(model, parameters, step + 1)
        optimizer.load_state_dict(saved)
        if self.in_eval:
            optimizer.train()
        record.note("loaded: weights", [p.detach() for p in parameters])
        return model, parameters, optimizer


def note_metrics(record: Record, when: str, optimizer: ProdigyPlusScheduleFree) -> None:
    """Record the metrics."""
    record.note(f"{when}: metrics", optimizer.metrics(), keep=True)


def note_end(record: Record, model: nn.Module, optimizer: ProdigyPlusScheduleFree) -> None:
    """Record all that there is at the end of a case."""
    record.note("weights", dict(model.named_parameters()), keep=True)
    note_metrics(record, "end", optimizer)
    record.note("state_dict", optimizer.state_dict(), keep=True)
    record.note("averaged", optimizer.averaged_state_dict(model), keep=True)
    with optimizer.averaged_parameters():
        record.note("average lent", dict(model.named_parameters()))
    record.note("weights as before", dict(model.named_parameters()))
    optimizer.eval()
    record.note("end in eval", dict(model.named_parameters()))
    record.note("state_dict in eval", optimizer.state_dict())


# ------------------------------------------------------------------------------------------ options

# A first step size that moves the weights by about their own size.
LARGE = {"d0": 1e-2}

ADAM, MUON, DECAY = {"use_schedulefree": False}, {"use_muon_pp": True}, {"weight_decay": 0.1}
DECAY_BY_ITSELF = {"weight_decay": 0.01, "weight_decay_by_lr": False}
CAUTIOUS, GRAMS, ADOPT = {"use_cautious": True}, {"use_grams": True}, {"use_adopt": True}
FOCUS, ORTHOGRAD = {"use_focus": True}, {"use_orthograd": True}
ATAN2: Options = {"eps": None, "use_stableadamw": False}
ATAN2_WITH_STABLE: Options = {"eps": None}
SPEED: Options = {"use_speed": True}
RELATIVE: Options = {"use_speed": "relative"}
RADAM = {"use_bias_correction": True, "betas": (0.9, 0.9)}
HALF_Z, FREEZES = {"bfloat16_z": True}, {"prodigy_steps": 3}
FULL, NARROW = {"factored": False}, {"factored_fp32": False}
BETA4: Options = {"beta4": 0.5}
C = {"schedulefree_c": 50.0}

# All pairs of these are played; the others are factors, or have products of their own below.
FACTORS = ("lr", "betas", "beta3", "d0", "d_coef", "warmup_steps")
SETTINGS: tuple[Options, ...] = tuple(
    table.alone(table.named("passes", "numbers", but=(*FACTORS, "muon_fp32", "muon_quintic", "muon_batched")))
)

ALONE: tuple[Options, ...] = (
    {},
    *SETTINGS,
    *(options for options in table.alone(edges=True) if options not in SETTINGS),
    *(ATAN2_WITH_STABLE, FOCUS, {"d0": 1e-6}),
)


def merged(*options: Options) -> dict[str, Any]:
    """Merge options; later ones win."""
    return {name: value for its in options for name, value in its.items()}


def subsets(*options: Options) -> Iterator[dict[str, Any]]:
    """All subsets, merged."""
    for count in range(len(options) + 1):
        for chosen in itertools.combinations(options, count):
            yield merged(*chosen)


def products(*factors: Sequence[Options]) -> list[dict[str, Any]]:
    """All products, merged."""
    return [merged(*chosen) for chosen in itertools.product(*factors)]


MUON_KINDS = ({"muon_quintic": True}, {"muon_batched": True}, {"muon_fp32": True})

TOGETHER: tuple[Options, ...] = (
    *products([ADAM], [options for options in SETTINGS if options not in (ADAM, MUON)]),
    *products([CAUTIOUS, GRAMS], [DECAY, DECAY_BY_ITSELF], [{}, ADAM, HALF_Z, MUON, ATAN2, ORTHOGRAD]),
    *products([HALF_Z], [CAUTIOUS, GRAMS], [DECAY, DECAY_BY_ITSELF], [C, RADAM, ADOPT, FREEZES]),
    *products([MUON], list(subsets(*MUON_KINDS))[1:], [{}, ADAM, HALF_Z]),
    *products([MUON], [{"use_stableadamw": False}], [{}, ADAM, {"muon_fp32": True}]),
    *products(
        [{}, ADAM, HALF_Z, RADAM, ATAN2], [its for its in subsets(ADOPT, FOCUS, ORTHOGRAD) if len(its) > 1]
    ),
    *products([SPEED, RELATIVE], [RADAM, FREEZES, HALF_Z, {"d_coef": 2.0}, {"d_limiter": False}], [{}, ADAM]),
    *products([FREEZES], [MUON, FOCUS, RELATIVE], [ADAM, HALF_Z]),
    *products([RADAM], [ADOPT, ATAN2, CAUTIOUS], [DECAY, C, FULL]),
    merged(ADOPT, {"use_stableadamw": False}, FULL, DECAY_BY_ITSELF, GRAMS, C, BETA4),
    merged(RADAM, SPEED, CAUTIOUS, HALF_Z, DECAY, ORTHOGRAD, NARROW, {"slice_p": 1}),
)

COMPILED: tuple[Options, ...] = (
    {},
    {**DECAY_BY_ITSELF, **ATAN2},
    {**SPEED, **C},
    RELATIVE,
    {"use_stableadamw": False, **RADAM},
    {**FULL, **FREEZES},
    HALF_Z,
    CAUTIOUS,  # which runs without
)

# Those that are played on meshes.
SHARDED: tuple[Options, ...] = (
    *({}, ADAM, DECAY_BY_ITSELF, ATAN2, SPEED, RELATIVE, RADAM, HALF_Z, FULL, BETA4, C, FREEZES),
    {**NARROW, "slice_p": 1},
    *({**ADAM, **CAUTIOUS, **DECAY}, {**CAUTIOUS, **HALF_Z, **DECAY}, {**GRAMS, **DECAY_BY_ITSELF}),
    *(ADOPT, {**ADOPT, **ORTHOGRAD}, {**ORTHOGRAD, **ADAM}, FOCUS, {**FOCUS, **ADAM}, {**FOCUS, **ORTHOGRAD}),
    *({"split_groups": False, **SPEED}, {"split_groups_mean": False, "slice_p": 3}),
    *(MUON, {**MUON, **ADAM, "muon_fp32": True}, {**MUON, **CAUTIOUS, "muon_batched": True}),
    {**MUON, **HALF_Z, "muon_quintic": True, **DECAY},
    {**MUON, **ADAM, **GRAMS, "use_stableadamw": False, "muon_batched": True},
)


def groups_of(parameters: Sequence[nn.Parameter], options: Options) -> list[dict[str, Any]]:
    """Groups for options: for Muon matrices only, and two groups for options that concern several."""
    if options.get("use_muon_pp"):
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim < 2]
        return [{"params": matrices}, {"params": others, "use_muon_pp": False}]
    if "split_groups" in options or "split_groups_mean" in options:
        return [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.5}]
    return [{"params": list(parameters)}]


def optimizer_of(
    groups: Any, options: Options, *, sharded: bool = False, **others: Any
) -> ProdigyPlusScheduleFree:
    """The optimiser of one process, or of sharded parameters."""
    from prodigyplus import ProdigyPlusScheduleFree
    from prodigyplus_dist import ShardedProdigyPlusScheduleFree

    kind = ShardedProdigyPlusScheduleFree if sharded else ProdigyPlusScheduleFree
    return kind(groups, **copied({**LARGE, **options, **others}))


def copied(options: Options) -> dict[str, Any]:
    """Options with tensors of their own, which no other optimiser shares."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}


# ------------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """What is played, on how many processes."""

    name: str
    play: Callable[[Record], None]
    ranks: int = 1
    compiles: bool = False


def made(options: Options, *, sharded: bool = False, others: Options | None = None) -> Make:
    """What makes the optimiser with these options; ``True`` in ``others`` is the group of all."""

    def make(model: nn.Module, parameters: list[nn.Parameter], step: int) -> ProdigyPlusScheduleFree:
        given = {name: dist.group.WORLD if value is True else value for name, value in (others or {}).items()}
        return optimizer_of(groups_of(parameters, options), options, sharded=sharded, **given)

    return make


def of_groups(kinds: Sequence[Options], options: Options, *, sharded: bool = False) -> Make:
    """What makes an optimiser of groups that differ."""
    return lambda model, parameters, step: optimizer_of(several(parameters, kinds), options, sharded=sharded)


def each(
    kind: str,
    chosen: Iterable[Options],
    dtypes: Sequence[torch.dtype] | None = (FLOAT32, BFLOAT16),
    make: Callable[[Options], Make] = made,
    **how: Any,
) -> Iterator[Case]:
    """A case for each of some options, in each of some dtypes; None is float32, and not in the name."""
    for options in chosen:
        for dtype in dtypes or (FLOAT32,):
            width = f"{WIDTHS[dtype]} " if dtypes else ""
            play = Play(make=make(options), dtype=dtype, **{"shapes": SMALL_SHAPES, **how})
            name = f"{kind} {width}{table.text_of(options)}".strip()
            yield Case(name, play, compiles="compiled" in kind)


def dtype_in_turn(number: int, options: Options) -> Sequence[torch.dtype]:
    """Alternate between two dtypes, unless an option needs one of them."""
    if "stochastic_rounding" in options:
        return (BFLOAT16,)
    return (FLOAT32,) if number % 2 or "bfloat16_z" in options else (BFLOAT16,)


def tables() -> Iterator[Case]:
    """Every option, and options together, on one process."""
    shapes: Shapes
    for number, options in enumerate(ALONE):
        # Large matrices are orthogonalised slowly in bfloat16.
        shapes = SMALL_SHAPES if options.get("use_muon_pp") else SHAPES
        yield from each("", [options], list(WIDTHS)[: 3 if number <= len(SETTINGS) else 2], shapes=shapes)
    for number, options in enumerate(TOGETHER):
        yield from each("", [options], dtype_in_turn(number, options))
    for number, (one, other) in enumerate(itertools.combinations(SETTINGS, 2)):
        both = merged(one, other)
        if not one.keys() & other.keys() and both not in TOGETHER:
            yield from each("pair", [both], dtype_in_turn(number, both))
    # Where the step size moves late.
    slow: tuple[Options, ...] = (SPEED, {**SPEED, **ADAM}, {"use_bias_correction": True}, RADAM, FOCUS, MUON)
    yield from each("longer", slow, steps=24)
    large: list[Options] = [{}, ADAM, HALF_Z, ADOPT, RELATIVE, {**MUON, "muon_fp32": True}]
    large += [{**FOCUS, **ORTHOGRAD}, {**CAUTIOUS, **DECAY}]
    yield from each("large", large, None, shapes=LARGE_SHAPES)
    half: tuple[Options, ...] = ({}, ADAM, ADOPT, NARROW, {**MUON, **CAUTIOUS})
    yield from each("gradients in bfloat16", half, None, grad_dtype=BFLOAT16)
    yield from each("saved in eval", ({}, ADAM, HALF_Z, FREEZES, RADAM), in_eval=True)
    for options in COMPILED:  # each kind and each number of dimensions is compiled separately
        shapes = COMPILED_SHAPES if options == {} else COMPILED_SHAPES[1:3]
        yield from each("compiled", [options], None, compiled, shapes=shapes)
    yield from each("compiled", [DECAY], (BFLOAT16,), compiled, shapes=COMPILED_SHAPES[1:3])


def compiled(options: Options) -> Make:
    """What makes the optimiser with these options, compiled."""
    return made({**options, "compile": True})


DIFFERENT: tuple[Options, ...] = (
    {"lr": 0.5},
    {**DECAY, "betas": (0.8, 0.95)},
    SPEED,
    {**ADAM, "betas": (0.9, 0.95)},
    {**RELATIVE, **HALF_Z},
)


def several(parameters: Sequence[nn.Parameter], kinds: Sequence[Options]) -> list[dict[str, Any]]:
    """Groups that differ, of all parameters in turn."""
    count = len(kinds)
    return [{"params": list(parameters[i::count]), **options} for i, options in enumerate(kinds)]


def groups() -> Iterator[Case]:
    """Several groups, and changes of groups during a run."""
    shared: dict[str, Options] = {
        "mean": {},
        "apart": {"split_groups_mean": False},
        "pooled": {"split_groups": False},
    }
    growing: Options = {"d0": 1e-4, "d_limiter": False}
    pooled: Options = {"split_groups": False}
    mixed: tuple[Options, ...] = ({}, pooled, {"split_groups_mean": False}, pooled, DECAY)
    for dtype, width in list(WIDTHS.items())[:2]:
        play = functools.partial(Play, dtype=dtype, shapes=SMALL_SHAPES)
        for name, how in shared.items():
            for d, numbers in {"": {}, " growing": growing}.items():
                make = of_groups(DIFFERENT, {**how, **numbers})
                yield Case(f"groups {name}{d} {width}", play(make=make, steps=40 if d else 12))
        yield Case(f"groups of all kinds {width}", play(make=of_groups(mixed, {}), steps=15))
        for name, how in shared.items():
            late, add = late_group(how)
            yield Case(f"groups {name}, one late {width}", play(make=late, between=add, steps=12))
            make = of_groups(({}, DECAY, {"lr": 0.5}), how)
            yield Case(f"groups {name}, one frozen {width}", play(make=make, between=freeze, steps=12))
        chosen: tuple[Options, ...] = ({}, ADAM, HALF_Z, RADAM)
        one_and_other = functools.partial(of_groups, ({}, DECAY))
        yield from each("schedule", chosen, (dtype,), one_and_other, between=schedule, steps=13)
        yield from each("gradients that come late", chosen, (dtype,), lacks=lacks_at_first)


def late_group(options: Options) -> tuple[Make, Between]:
    """A group that is added before step 4: what makes the optimiser, and what adds the group."""

    def make(model: nn.Module, parameters: list[nn.Parameter], step: int) -> ProdigyPlusScheduleFree:
        optimizer = optimizer_of(parameters[:5], options)
        if step > 4:
            add(4, optimizer, parameters)
        return optimizer

    def add(step: int, optimizer: ProdigyPlusScheduleFree, parameters: list[nn.Parameter]) -> None:
        if step == 4:
            optimizer.add_param_group({"params": parameters[5:], "lr": 0.5, **DECAY})

    return make, add


def lacks_at_first(number: int, step: int) -> bool:
    """Gradients start late, later for some parameters than for others."""
    return step < 2 * (number % 4)


def freeze(step: int, optimizer: ProdigyPlusScheduleFree, parameters: list[nn.Parameter]) -> None:
    """Train a group from step 4 on, and another until then."""
    for number, p in enumerate(parameters):
        p.requires_grad_(number % 3 != (1 if step < 4 else 2))


def schedule(step: int, optimizer: ProdigyPlusScheduleFree, parameters: list[nn.Parameter]) -> None:
    """Change options: a warm-up from zero, a pause, β1, and a step size that freezes."""
    for group in optimizer.param_groups:
        group["lr"] = (0.0, 0.25, 0.5, 1.0, 1.0, 0.0, 1.0, 0.5, 0.5)[min(step, 8)]
        group["betas"] = (0.9 if step < 7 else 0.95, 0.95)
        group["prodigy_steps"] = 10 if step > 6 else 0


class Small(nn.Module):
    """A model with a layer of each kind, and sizes that no number of processes divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 9)
        self.blocks = nn.ModuleList(nn.Linear(9, 9) for _ in range(2))
        self.up = nn.Linear(9, 15)
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.down = nn.Linear(45, 7, bias=False)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 5)
        for number, p in enumerate(self.parameters()):
            with torch.no_grad():
                p.copy_(drawn(tuple(p.shape), 500 + number) / 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        x = torch.relu(self.up(x))
        x = self.norm(self.down(torch.relu(self.conv(x.unsqueeze(1))).flatten(1)))
        loss: Tensor = self.head(x).float().square().mean()
        return loss


def tokens_of(step: int, rank: int = 0) -> Tensor:
    """What a model is trained on in a step."""
    return (torch.arange(6) * 5 + 3 * step + 7 * rank) % 13


def train_model(
    record: Record,
    wrapped: nn.Module,
    model: nn.Module,
    optimizer: ProdigyPlusScheduleFree,
    rank: int = 0,
    steps: int = STEPS,
) -> None:
    """Train a model by its own gradients, and record the results."""
    for step in range(steps):
        loss = wrapped(tokens_of(step, rank))
        (loss * torch.nan if step == NAN_AT else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        record.note(f"step {step}: loss", loss)
        record.note(f"step {step}: weights", [p.detach() for p in model.parameters()])
        if step == EVAL_AFTER:
            optimizer.eval()
            with torch.no_grad():
                record.note("in eval: loss", wrapped(tokens_of(step, rank)))
            optimizer.train()
        if step == RELOAD_AFTER:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    record.note("whole", optimizer.averaged_state_dict(model, full=True), keep=True)
    note_end(record, model, optimizer)


def play_small(record: Record, options: Options, dtype: torch.dtype, muon: bool) -> None:
    """Train a model on one process."""
    from prodigyplus import muon_groups

    model = Small().to(dtype)
    if muon:
        record.note("groups", [sorted(its) for its in muon_groups(model)])
    optimizer = optimizer_of(muon_groups(model) if muon else model.named_parameters(), options)
    if options.get("fused_back_pass"):
        optimizer.fuse_backward(model)
    train_model(record, model, model, optimizer)


def models() -> Iterator[Case]:
    """Models with gradients of their own, on one process."""
    fused: Options = {"fused_back_pass": True}
    kinds: list[Options] = [
        {},
        ADAM,
        {**HALF_Z, **CAUTIOUS},
        fused,
        {**fused, **ADOPT},
        {**fused, **ADAM, **GRAMS},
    ]
    for (dtype, width), options in itertools.product(list(WIDTHS.items())[:2], kinds):
        for muon in (True, False):
            play = functools.partial(play_small, options=options, dtype=dtype, muon=muon)
            yield Case(f"model {'with muon_groups ' * muon}{width} {table.text_of(options)}", play)


def fused() -> Iterator[Case]:
    """Steps within the backward pass."""
    kinds = (*SETTINGS, {"eps": None}, {**CAUTIOUS, **HALF_Z, **DECAY}, {**ADAM, **ADOPT, **ORTHOGRAD})
    for number, options in enumerate(({}, *kinds)):
        dtypes = dtype_in_turn(number, options) if number > 2 else (FLOAT32, BFLOAT16)
        yield from each("fused", [options], dtypes, made_fused, in_backward=True)
        if options in ({}, ADAM, MUON, RELATIVE):
            in_part = functools.partial(made_fused, every=False)
            yield from each("fused in part", [options], dtypes, in_part, in_backward=True)


def made_fused(options: Options, every: bool = True) -> Make:
    """Makes an optimiser that moves all parameters, or only its first group, in the backward pass."""

    def make(model: nn.Module, parameters: list[nn.Parameter], step: int) -> ProdigyPlusScheduleFree:
        parts = groups_of(parameters if every else parameters[::2], options)
        if not every:
            parts.append({"params": parameters[1::2], "fused_back_pass": False, "use_muon_pp": False})
        optimizer = optimizer_of(parts, options, fused_back_pass=True)
        optimizer.fuse_backward(model)
        return optimizer

    return make


def clamped(w: Tensor) -> None:
    """Hold weights between bounds, in place."""
    w.clamp_(-0.75, 0.75)


def unit_rows(w: Tensor) -> Tensor:
    """Give rows the norm 1."""
    norms: Tensor = w.norm(dim=-1, keepdim=True)
    return w / norms.clamp(min=1e-6)


def made_held(options: Options, *, sharded: bool = False) -> Make:
    """Makes an optimiser that constrains some parameters to sets."""

    def make(model: nn.Module, parameters: list[nn.Parameter], step: int) -> ProdigyPlusScheduleFree:
        optimizer = made(options, sharded=sharded)(model, parameters, step)
        optimizer.constrain([parameters[0], parameters[2], parameters[4]], clamped)
        if not sharded:
            optimizer.constrain(parameters[-1], unit_rows)
        return optimizer

    return make


def held() -> Iterator[Case]:
    """Weights that are constrained to sets."""
    chosen: list[Options] = [{}, ADAM, HALF_Z, MUON, FOCUS, RELATIVE, ATAN2, RADAM]
    chosen += [{**CAUTIOUS, **DECAY}, {**ADAM, **GRAMS}]
    yield from each("held", chosen, make=made_held, in_eval=True)


def odd() -> Iterator[Case]:
    """Unusual parameters and loops."""

    def transposed(number: int, tensor: Tensor) -> Tensor:
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor

    of_any: tuple[Options, ...] = ({}, ADAM, MUON, HALF_Z, {**ADOPT, **CAUTIOUS}, FOCUS)
    yield from each("strided", of_any, place=transposed)
    yield from each("no gradients at all", of_any, lacks=lambda n, step: step in (0, 3))
    of_small: tuple[Options, ...] = ({}, ADAM, {**CAUTIOUS, **DECAY}, ADOPT, HALF_Z, ORTHOGRAD)
    many: Shapes = ((5,),) * 40 + ((4, 6),) * 30
    yield from each("many of a shape", of_small, None, shapes=many, lacks=lacks_none)
    yield from each("empty", of_small, None, shapes=((0,), (0, 3)), lacks=lacks_none)


# ------------------------------------------------------------------------------------------ cases of meshes

Axes = Callable[[tuple[int, ...]], Sequence[Placement]]


def along_first(shape: tuple[int, ...]) -> list[Placement]:
    """Shard as ``fully_shard`` does."""
    return [Shard(0) if shape else Replicate()]


def along_last(shape: tuple[int, ...]) -> list[Placement]:
    """Shard by columns."""
    return [Shard(len(shape) - 1) if shape else Replicate()]


def hybrid(shape: tuple[int, ...]) -> list[Placement]:
    """Place as HSDP does."""
    return [Replicate(), *along_first(shape)]


def tensor_parallel(shape: tuple[int, ...]) -> list[Placement]:
    """Place as FSDP × TP: tall matrices by their rows, wide ones by their columns, the rest replicated."""
    if len(shape) < 2:
        return [Shard(0) if shape else Replicate(), Replicate()]
    return [_StridedShard(0, split_factor=2), Shard(0)] if shape[0] >= shape[1] else [Shard(0), Shard(1)]


def both_dims(shape: tuple[int, ...]) -> list[Placement]:
    """Shard by rows and by columns."""
    return [Shard(0), Shard(len(shape) - 1)] if len(shape) > 1 else [Replicate(), Replicate()]


# Name: sizes of its axes, where parameters lie, and which options are played, since all would take long.
MESHES: dict[str, tuple[tuple[int, ...], Axes, Sequence[Options]]] = {
    "FSDP": ((2,), along_first, SHARDED),
    "columns": ((2,), along_last, SHARDED[1::8]),
    "FSDP on 4": ((4,), along_first, ({}, {**MUON, "muon_batched": True})),
    "HSDP": ((2, 2), hybrid, SHARDED[::6]),
    "FSDP x TP": ((2, 2), tensor_parallel, SHARDED[2::6]),
    "rows x columns": ((2, 2), both_dims, ({**CAUTIOUS, **DECAY}, MUON)),
}


@functools.cache
def mesh_of(sizes: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh of all processes."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def placed(sizes: tuple[int, ...], axes: Axes, plain: bool) -> Place:
    """A function that places tensors on a mesh; with ``plain``, every third one stays plain."""

    def place(number: int, tensor: Tensor) -> Tensor:
        if plain and number % 3 == 2:
            return tensor
        mesh = mesh_of(sizes)
        return distribute_tensor(tensor, mesh, axes(tuple(tensor.shape)), src_data_rank=None)

    return place


def lacks_none(number: int, step: int) -> bool:
    """No parameter is without a gradient."""
    return False


def lacks_on_first(number: int, step: int) -> bool:
    """As on one process, and parameters 0 and 5 have a gradient on some ranks only."""
    return is_missing(number, step) or (step == 1 and number in (0, 5) and dist.get_rank() == 0)


def meshes() -> Iterator[Case]:
    """The option table, on meshes."""
    for name, (sizes, axes, chosen) in MESHES.items():
        for number, options in enumerate(chosen):
            place = placed(sizes, axes, plain=number % 4 == 3)
            dtype = BFLOAT16 if number % 3 == 1 and "bfloat16_z" not in options else FLOAT32
            how: dict[str, Any] = {"dtype": dtype, "place": place, "lacks": lacks_on_first}
            make = made(options, sharded=True)
            yield on_mesh(sizes, f"{name} {WIDTHS[dtype]} {table.text_of(options)}", make, **how)
        if name not in ("FSDP", "HSDP", "FSDP x TP"):
            continue
        whole = placed(sizes, axes, plain=False)
        others: list[tuple[Options, Options]] = [
            ({**CAUTIOUS, **DECAY}, {"bucket_bytes": 2048}),
            (MUON, {"bucket_bytes": 2048, "all_to_all": False}),
        ]
        for options, other in others:
            make = made(options, sharded=True, others=other)
            yield on_mesh(sizes, f"{name} {table.text_of({**options, **other})}", make, place=whole)
        make = of_groups(DIFFERENT, {"d0": 1e-4, "d_limiter": False}, sharded=True)
        yield on_mesh(sizes, f"{name} groups", make, steps=10, place=placed(sizes, axes, plain=True))
        make = made_held(HALF_Z, sharded=True)
        yield on_mesh(sizes, f"{name} held", make, place=whole, in_eval=True)


def case_on(sizes: Sequence[int], name: str, play: Callable[[Record], None]) -> Case:
    """A case of a mesh of these sizes."""
    count = torch.Size(sizes).numel()
    return Case(f"{count} ranks, {name}", play, count)


def on_mesh(sizes: Sequence[int], name: str, make: Make, **how: Any) -> Case:
    """Steps on parameters whose gradients are given, on a mesh of these sizes."""
    return case_on(sizes, name, Play(make=make, shapes=SMALL_SHAPES, **how))


def shared() -> Iterator[Case]:
    """Plain tensors on two processes: other parameters on each, or copies that share Muon's work."""

    def apart(record: Record, options: Options) -> None:
        rank = dist.get_rank()
        shapes = tuple((*shape, 1) if len(shape) == 1 + rank else shape for shape in SMALL_SHAPES[rank:])
        make = made(options, sharded=True, others={"process_group": True})
        Play(make=make, shapes=shapes, lacks=lacks_none)(record)

    for options in ({}, ADAM, MUON, SPEED, {"split_groups_mean": False}, {**CAUTIOUS, **HALF_Z}):
        play = functools.partial(apart, options=options)
        yield case_on((2,), f"process_group {table.text_of(options)}", play)
    for options in products([MUON], [{}, ADAM, CAUTIOUS, {"muon_batched": True}, {"muon_fp32": True}]):
        make = made(options, sharded=True, others={"replicas": True})
        dtype = BFLOAT16 if options == MUON else FLOAT32
        yield on_mesh((2,), f"replicas {WIDTHS[dtype]} {table.text_of(options)}", make, dtype=dtype)


def wrapped() -> Iterator[Case]:
    """Models as torch shards them, each rank with gradients of its own."""
    chosen: tuple[Options, ...] = (
        {},
        {**CAUTIOUS, **HALF_Z, **DECAY},
        {"fused_back_pass": True},
        {"fused_back_pass": True, **ADAM, **ADOPT},
    )
    for name, sizes in {"fully_shard": (2,), "HSDP": (2, 2), "FSDP x TP": (2, 2), "DDP": (2,)}.items():
        for number, options in enumerate(chosen):
            muon = number in (1, 2)
            play = functools.partial(play_wrapped, kind=name, sizes=sizes, options=options, muon=muon)
            of = " with muon_groups" if muon else ""
            yield case_on(sizes, f"model, {name}{of} {table.text_of(options)}", play)


def play_wrapped(record: Record, kind: str, sizes: tuple[int, ...], options: Options, muon: bool) -> None:
    """Train a model that is wrapped by torch."""
    from prodigyplus import muon_groups

    model, rank = Small(), dist.get_rank()
    outer: nn.Module = model
    if kind == "DDP":
        outer = DistributedDataParallel(model, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    elif kind == "FSDP x TP":
        mesh = mesh_of(sizes, ("fsdp", "tp"))
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], ColwiseParallel(output_layouts=Replicate()))
        parallelize_module(model.head, mesh["tp"], RowwiseParallel(input_layouts=Replicate()))
        fully_shard(model, mesh=mesh["fsdp"])
        rank = mesh["fsdp"].get_local_rank()
    else:
        mesh = mesh_of(sizes, ("copy", "fsdp")[-len(sizes) :])
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(muon_groups(model) if muon else model.parameters(), options, sharded=True)
    if options.get("fused_back_pass"):
        optimizer.fuse_backward(outer)
    train_model(record, outer, model, optimizer, rank)


def all_cases() -> list[Case]:
    """Every case, in the order in which they are played.

    Raises:
        ValueError: Two have the same name.
    """
    kinds = (tables, groups, models, fused, held, odd, meshes, shared, wrapped)
    cases: dict[str, Case] = {}
    for case in itertools.chain.from_iterable(kind() for kind in kinds):
        if case.name not in cases:  # a single one may also be among the pairs
            cases[case.name] = case
    return list(cases.values())


@dataclass(frozen=True)
class Choice:
    """Cases whose names match, with or without compiled ones, that set no option that a checkout lacks."""

    only: str
    without_compile: bool
    lacks: Sequence[str] = ()

    def cases(self, ranks: int | None = None) -> list[Case]:
        """All of them, or those on some number of ranks."""
        return [
            case
            for case in all_cases()
            if re.search(self.only, case.name)
            and ranks in (None, case.ranks)
            and not (self.without_compile and case.compiles)
            and not any(f" {name}=" in case.name for name in self.lacks)
        ]


def options_of(checkout: Path) -> set[str]:
    """The options that the optimiser of a checkout has.

    Raises:
        ValueError: One has no row in the table of options.
    """
    program = "from prodigyplus.options import NAMES; print(*NAMES)"
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program]
    told = subprocess.run(
        command, env=environment, cwd=checkout, check=True, capture_output=True, text=True
    ).stdout
    names = set(told.split())
    if names - table.TABLE.keys():
        raise ValueError(
            f"tests/option_table.py has no row for {', '.join(sorted(names - table.TABLE.keys()))}"
        )
    return names


# ------------------------------------------------------------------------------------------ processes


def play_here(checkout: Path, folder: Path, choice: Choice) -> None:
    """Play the cases for the present number of ranks, and write what they show; every rank calls it.

    Raises:
        RuntimeError: The packages are not those of the checkout.
    """
    import prodigyplus

    if checkout not in Path(prodigyplus.__file__).resolve().parents:
        raise RuntimeError(f"imported {prodigyplus.__file__}, which is not in {checkout}")
    warnings.simplefilter("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for number, case in enumerate(choice.cases(ranks)):
        record = Record()
        try:
            case.play(record)
        except Exception as raised:
            record.hashes["raised"] = f"{type(raised).__name__}: {raised}".splitlines()[0]
        torch.save((record.hashes, record.tensors), folder / f"{ranks}.{rank}.{number}.pt")
        if "raised" in record.hashes and ranks > 1:
            os._exit(BROKEN)  # others may be waiting for this process: they must see that it has ended


def play_all(checkout: Path, folder: Path, choice: Choice) -> None:
    """Play the cases of a checkout, one number of ranks at a time.

    Raises:
        SystemExit: A process failed outside a case.
    """
    folder.mkdir()
    for ranks in sorted({case.ranks for case in choice.cases()}):
        started = time.monotonic()
        try:
            on_ranks(ranks, play_here, checkout, folder, choice, limit=LONGEST, path=[checkout])
        except WorkerError as failure:
            if failure.said != f"the process died: exit code {BROKEN}":
                raise SystemExit(f"{checkout}: a process of {ranks} failed: {failure}") from None
        count = len(choice.cases(ranks))
        print(f"{checkout}: {count} cases on {ranks} in {time.monotonic() - started:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------ comparison


def record_in(file: Path) -> Record:
    """The record of a case; empty if it was not played."""
    return Record(*torch.load(file, weights_only=True)) if file.exists() else Record()


def compare(folders: Sequence[Path], choice: Choice) -> int:
    """Print what differs; returns how many cases are the same."""
    same = 0
    for ranks in sorted({case.ranks for case in choice.cases()}):
        for number, case in enumerate(choice.cases(ranks)):
            lines = []
            for rank in range(ranks):
                line = difference(*(record_in(folder / f"{ranks}.{rank}.{number}.pt") for folder in folders))
                lines += [f"rank {rank}: {line}" if ranks > 1 else line] if line else []
            if lines:
                told = next((line for line in lines if "raised" in line), lines[0])
                print(f"DIFFERS  {case.name}: {told}")
            same += not lines
    return same


def difference(old: Record, new: Record) -> str:
    """The difference in a case on one rank, in words; empty if there is none."""
    both = {"old": old.hashes, "new": new.hashes}
    for name, hashes in both.items():
        if "raised" in hashes:
            return f"raised in {name}: {hashes['raised']}"
        if not hashes:
            return f"not played in {name}"
    if list(old.hashes.items()) == list(new.hashes.items()):
        return ""
    common = [what for what in old.hashes if what in new.hashes]
    said = []
    for name, hashes in both.items():
        alone = [what for what in hashes if what not in common]
        if alone:
            said.append(f"{len(alone)} only in {name}: {', '.join(alone[:3])}")
    different = [what for what in common if old.hashes[what] != new.hashes[what]]
    if not different:
        return "; ".join([*said, "all else is the same" if said else "the same, in another order"])
    kept = [what for what in different if what in old.tensors and what in new.tensors]
    distances = {what: distance(old.tensors[what], new.tensors[what]) for what in kept}
    finite = {what: value for what, value in distances.items() if not math.isnan(value)}
    largest = max(finite, key=finite.__getitem__, default="")
    by = f"; by {finite[largest]:.1e} at most, in {largest}" if largest else ""
    first = f"{len(different)} of {len(common)} differ, first {', '.join(different[:3])}{by}"
    return "; ".join([*said, first])


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors; NaN if they cannot be compared."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("nan")
    return (one.double() - other.double()).abs().max().item() if one.numel() else 0.0


def main() -> None:
    """Play and compare."""
    cli = parser(__doc__)
    cli.add_argument("--old", type=Path, metavar="CHECKOUT")
    cli.add_argument("--new", type=Path, metavar="CHECKOUT", default=ROOT)
    cli.add_argument("--only", metavar="PATTERN", default="")
    cli.add_argument("--without-compile", action="store_true")
    cli.add_argument("--list", action="store_true")
    given = cli.parse_args()
    if given.list:
        print("\n".join(case.name for case in Choice(given.only, given.without_compile).cases()))
        return
    if given.old is None:
        cli.error("--old CHECKOUT is needed")
    checkouts = given.old.resolve(), given.new.resolve()
    for checkout in checkouts:
        if not (checkout / "prodigyplus").is_dir():
            cli.error(f"{checkout} is no checkout: it has no prodigyplus/")
    lacks = table.TABLE.keys() - set.intersection(*map(options_of, checkouts))
    choice = Choice(given.only, given.without_compile, sorted(lacks))
    if not (cases := choice.cases()):
        cli.error(f"no case has {given.only!r} in its name")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # its processes end too, and its folder goes
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in ("old", "new")]
        for checkout, folder in zip(checkouts, folders, strict=True):
            play_all(checkout, folder, choice)
        same = compare(folders, choice)
    print(f"{len(cases)} cases, {same} of them the same to the bit")
    sys.exit(same != len(cases))


if __name__ == "__main__":
    main()
