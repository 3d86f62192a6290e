"""The optimisers: ours without a setting, and peers over rates, with and without warm-up and schedule.

A new one is an entry in OPTIMIZERS. Packages of others are imported when one of their optimisers is built;
``missing`` says what is not installed. All have Adam's β of ours and no weight decay, so that the step size
and its schedule are what differs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from prodigyplus import ProdigyPlusScheduleFree, muon_groups

BETAS = (0.9, 0.99)
WARM_UP = 0.05  # of all steps
DECAY_FROM = 0.8  # of all steps: where warm-up, stable, decay begins to decay
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
# Schedule-Free takes larger ones.
LARGER_RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1)
# What an estimated step size is multiplied by.
FACTORS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PUBLISHED = "published_prodigyplus"  # what the package of our import name is called here

Schedule = Literal["constant", "cosine", "wsd"]
Built = Sequence[Optimizer]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of an optimiser: its rate, or factor, and whether it warms up; None for what is untuned."""

    rate: float | None = None
    warm_up: bool = False

    def warm_up_steps(self, steps: int) -> int:
        """How many of so many steps warm up."""
        return math.ceil(WARM_UP * steps) if self.warm_up else 0


@dataclass(frozen=True, slots=True)
class Entry:
    """An optimiser.

    Attributes:
        name: As the command line and the report have it.
        build: Makes it, or several that share a model, for a setting and a number of steps.
        rates: What is tuned over; empty if nothing is.
        tuned: Whether these are rates, or factors of a step size that the optimiser finds.
        schedule: What the rate is multiplied by.
        warms_itself: Whether it has a warm-up of its own, so that the loop has none.
        distribution: The package that has to be installed; empty for ours.
    """

    name: str
    build: Callable[[nn.Module, Setting, int], Built]
    rates: tuple[float, ...] = ()
    tuned: Literal["rate", "factor", "nothing"] = "rate"
    schedule: Schedule = "constant"
    warms_itself: bool = False
    distribution: str = "torch"

    def settings(
        self, rates: Sequence[float] | None = None, warm_ups: Sequence[bool] = (True, False)
    ) -> list[Setting]:
        """What it is run with: all, or some rates only, with warm-up, without, or both."""
        if self.tuned == "nothing":
            return [Setting()]
        return [Setting(rate, warm_up) for warm_up in warm_ups for rate in rates or self.rates]

    def factor(self, setting: Setting, step: int, steps: int) -> float:
        """What the rate of a step is multiplied by."""
        warm = 1.0
        if setting.warm_up and not self.warms_itself:
            warm = min(1.0, (step + 1) / setting.warm_up_steps(steps))
        if self.schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        if self.schedule == "wsd":
            return warm * min(1.0, (1 - step / steps) / (1 - DECAY_FROM))
        return warm


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


# ----------------------------------------------------------------------- how each of them is built


def ours(model: nn.Module, setting: Setting, steps: int, **options: Any) -> Built:
    """Ours, as it comes but for ``options``."""
    return [ProdigyPlusScheduleFree(trained(model), **options)]


def ours_muon(
    model: nn.Module, setting: Setting, steps: int, *, after_flatten: bool = True, **options: Any
) -> Built:
    """Ours, with Muon for what ``muon_groups`` finds: on a CPU, which is slow in bfloat16, in float32.

    Without ``after_flatten``, dense layers that read pixels or flattened feature maps keep Adam's direction.
    """
    exclude = [] if after_flatten else list(weights_after_flatten(model))
    groups: list[dict[str, Any]] = []
    for group in muon_groups(model, exclude=exclude):
        if params := [p for _, p in group["params"] if p.requires_grad]:
            in_float32 = all(p.device.type == "cpu" for p in params)
            muon = {"muon_fp32": in_float32} if group["use_muon_pp"] else {}
            groups.append({**group, **muon, "params": params})
    return [ProdigyPlusScheduleFree(groups, **options)]


def weights_after_flatten(model: nn.Module) -> Iterator[str]:
    """The names of the weights of dense layers that come right after ``nn.Flatten``."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            for (_, before), (name, layer) in itertools.pairwise(module.named_children()):
                if isinstance(before, nn.Flatten) and isinstance(layer, nn.Linear):
                    yield ".".join(filter(None, (prefix, name, "weight")))


def adamw(model: nn.Module, setting: Setting, steps: int) -> Built:
    """AdamW of torch."""
    return [AdamW(trained(model), lr=rate_of(setting), betas=BETAS, weight_decay=0.0)]


def muon(model: nn.Module, setting: Setting, steps: int) -> Built:
    """Muon of torch for the hidden matrices, its update as large as AdamW's, which moves the rest."""
    hidden, rest = hidden_and_rest(model)
    rate = rate_of(setting)
    built: list[Optimizer] = [AdamW(rest, lr=rate, betas=BETAS, weight_decay=0.0)] if rest else []
    if hidden:
        built.append(torch.optim.Muon(hidden, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return built


def dion(model: nn.Module, setting: Setting, steps: int, *, name: str) -> Built:
    """An optimiser of the dion package, divided and scaled as torch's Muon is here."""
    kind = getattr(importlib.import_module("dion"), name)
    hidden, rest = hidden_and_rest(model)
    groups: list[dict[str, Any]] = [{"params": hidden}, {"params": rest, "algorithm": "adamw"}]
    groups = [group for group in groups if group["params"]]
    return [kind(groups, lr=rate_of(setting), betas=BETAS, weight_decay=0.0, adjust_lr="rms_norm")]


def hidden_and_rest(
    model: nn.Module, *, convolutions: bool = False
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters that Muon is for, with or without convolutions, and the other trained ones."""
    groups = [group["params"] for group in muon_groups(model) if group["use_muon_pp"]]
    matrices = {p for group in groups for _, p in group if convolutions or p.ndim == 2}
    hidden = [p for p in trained(model) if p in matrices]
    return hidden, [p for p in trained(model) if p not in matrices]


def schedulefree(model: nn.Module, setting: Setting, steps: int) -> Built:
    """AdamW of the schedulefree package."""
    kind = importlib.import_module("schedulefree").AdamWScheduleFree
    warm_up = setting.warm_up_steps(steps)
    return [kind(trained(model), lr=rate_of(setting), betas=BETAS, warmup_steps=warm_up)]


def schedulefree_plus(model: nn.Module, setting: Setting, steps: int) -> Built:
    """ScheduleFree+ as its paper has it: Polyak's step size, times a factor."""
    kind = importlib.import_module("schedulefree").AdamCScheduleFreePlusPaper
    warm_up = setting.warm_up_steps(steps)
    return [kind(trained(model), lr=rate_of(setting), c_warmup=warm_up, sf_beta1_anneal_steps=steps)]


def prodigy(model: nn.Module, setting: Setting, steps: int) -> Built:
    """Prodigy of its authors' package, with its safeguard where the rate warms up."""
    kind = importlib.import_module("prodigyopt").Prodigy
    return [kind(trained(model), lr=rate_of(setting), betas=BETAS, safeguard_warmup=setting.warm_up)]


def d_adaptation(model: nn.Module, setting: Setting, steps: int) -> Built:
    """Adam with D-Adaptation."""
    kind = importlib.import_module("dadaptation").DAdaptAdam
    return [kind(trained(model), lr=rate_of(setting), betas=BETAS)]


def published(model: nn.Module, setting: Setting, steps: int) -> Built:
    """The published package whose name and options we share; it has no warm-up of its own."""
    kind = published_module().ProdigyPlusScheduleFree
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        return [kind(trained(model), lr=rate_of(setting))]


def published_module() -> Any:
    """The published package's module, under another name than ours.

    Raises:
        ImportError: It is in no folder of the path.
    """
    if PUBLISHED not in sys.modules:
        folders = (Path(folder) / "prodigyplus" for folder in sys.path)
        # A file that it has and we do not.
        found = next((folder for folder in folders if (folder / "core_optimiser.py").exists()), None)
        if found is None:
            raise ImportError("prodigy-plus-schedule-free is in no folder of the path")
        package = ModuleType(PUBLISHED)
        package.__path__ = [str(found)]
        sys.modules[PUBLISHED] = package
    return importlib.import_module(f"{PUBLISHED}.prodigy_plus_schedulefree")


def rate_of(setting: Setting) -> float:
    """The rate of a setting that has one."""
    assert setting.rate is not None
    return setting.rate


OPTIMIZERS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        # Ours: what is to be compared without tuning, each with the arguments that its name says; "inner":
        # without the dense layers after ``nn.Flatten``.
        Entry("ours", ours, tuned="nothing", distribution=""),
        Entry("ours-balance", partial(ours, step_size="balance"), tuned="nothing", distribution=""),
        Entry("ours-muon", ours_muon, tuned="nothing", distribution=""),
        Entry(
            "ours-balance-muon",
            partial(ours_muon, step_size="balance", split_groups_mean=False),
            tuned="nothing",
            distribution="",
        ),
        Entry(
            "ours-balance-muon-inner",
            partial(ours_muon, after_flatten=False, step_size="balance", split_groups_mean=False),
            tuned="nothing",
            distribution="",
        ),
        # Peers.
        Entry("adamw-constant", adamw, RATES),
        Entry("adamw-cosine", adamw, RATES, schedule="cosine"),
        Entry("adamw-wsd", adamw, RATES, schedule="wsd"),
        Entry("muon-constant", muon, RATES),
        Entry("muon-cosine", muon, RATES, schedule="cosine"),
        Entry("dion-muon-cosine", partial(dion, name="Muon"), RATES, schedule="cosine", distribution="dion"),
        Entry("normuon-cosine", partial(dion, name="NorMuon"), RATES, schedule="cosine", distribution="dion"),
        Entry(
            "schedulefree-adamw",
            schedulefree,
            LARGER_RATES,
            warms_itself=True,
            distribution="schedulefree",
        ),
        Entry("schedulefree-plus", schedulefree_plus, FACTORS, "factor", distribution="schedulefree"),
        Entry("prodigy-constant", prodigy, FACTORS, "factor", distribution="prodigyopt"),
        Entry("prodigy-cosine", prodigy, FACTORS, "factor", "cosine", distribution="prodigyopt"),
        Entry("d-adapt-constant", d_adaptation, FACTORS, "factor", distribution="dadaptation"),
        Entry("d-adapt-cosine", d_adaptation, FACTORS, "factor", "cosine", distribution="dadaptation"),
        Entry("published", published, FACTORS, "factor", distribution="prodigy-plus-schedule-free"),
    )
}

# ----------------------------------------------------------------------------- what all of them do


def missing(entry: Entry) -> str | None:
    """Why an optimiser cannot be built here; None if it can."""
    try:
        entry.build(nn.Linear(2, 2), entry.settings()[0], 1)
        version(entry)
    except (ImportError, AttributeError) as error:
        return str(error)
    return None


def version(entry: Entry) -> str:
    """The version of the package that an optimiser comes from."""
    if not entry.distribution:
        return "of this checkout"
    return importlib.metadata.version(entry.distribution)


def step(optimizer: Optimizer, loss: torch.Tensor) -> None:
    """Take a step."""
    if hasattr(optimizer, "step_func"):  # ScheduleFree+, which asks for the loss
        optimizer.step_func(loss.item())
    elif type(optimizer).__module__.startswith("dion"):
        with torch.compiler.set_stance("force_eager"):  # to compile takes longer than a small task does
            optimizer.step()
    else:
        optimizer.step()


@contextlib.contextmanager
def evaluating(built: Built) -> Iterator[None]:
    """Have the weights in the model that are to be evaluated: the average, where there is one."""
    averaging: list[Any] = [optimizer for optimizer in built if hasattr(optimizer, "eval")]
    with contextlib.ExitStack() as stack:
        for optimizer in averaging:
            if isinstance(optimizer, ProdigyPlusScheduleFree):
                stack.enter_context(optimizer.averaged_parameters())
            else:
                optimizer.eval()
                stack.callback(optimizer.train)
        yield


def rates(built: Built) -> list[float]:
    """The size of the last step, for each group: the rate, or what an optimiser made of its own estimate."""
    found = []
    for optimizer in built:
        if isinstance(optimizer, ProdigyPlusScheduleFree):
            found += [float(group["step_size"]) for group in optimizer.metrics()]
        else:
            found += [
                group.get("scheduled_lr") or group.get("d", 1.0) * group["lr"]
                for group in optimizer.param_groups
            ]
    return [float(rate) for rate in found]
