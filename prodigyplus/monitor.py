"""Warn of runs that go wrong, by the numbers that earlier steps have left, without waiting for the device.

Every ``_NUMBERS_EVERY`` steps the groups' numbers are sent to the host, and read at a later step, once they
have arrived. Each kind of problem is reported once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prodigyplus.engine.groups import Groups
from prodigyplus.exchange import Exchange
from prodigyplus.placement import Location, locations, memory_of
from prodigyplus.reporting import Warner, is_called_from
from prodigyplus.terms.isolation import is_captured
from prodigyplus.torch_private import version_of
from prodigyplus.view import View

# How many steps apart the groups' numbers are read, and the weights checked for changes by others.
_NUMBERS_EVERY, _WEIGHTS_EVERY = 50, 10

# How many steps may be skipped in a row, and by what factor step sizes that share a mean may differ.
_MOST_SKIPPED, _FURTHEST_APART = 500, 100.0

# Below which part of its maximum lr must be, and for how many steps in a row, to warn: a shorter dip may be
# meant.
_LEAST_LR, _MOST_STEPS_BELOW = 0.99, 10

# After how many changes of β1 to warn: a single one may be a decision.
_MOST_CHANGES_OF_BETA1 = 3

# By which step the d of some group must have doubled, and the largest d0 of groups of which that is expected.
_STEPS_TO_GROW, _SMALL_D0 = 500, 1e-4

# How many steps in a row may pass in which no parameter has a gradient.
_MOST_WITHOUT_GRADIENTS = 10

# After how many changes of weights to warn: a single one may be a checkpoint that was loaded.
_MOST_CHANGES = 3


class Monitor:
    """Watches the steps of an optimiser, and warns. Every call takes a view of the optimiser."""

    def __init__(self, warner: Warner) -> None:
        self._warner = warner
        self._steps = 0
        self._sent: _Sent | None = None
        # Of each group, k and skipped when k was last seen to grow.
        self._moved_at: list[tuple[int, int]] = []
        self._highest_lr: dict[int, float] = {}  # of each group, while its lr is a plain number
        self._steps_below = 0
        self._beta1: list[float] = []  # of each group, at the last step
        self._changes_of_beta1 = 0
        self._steps_without_gradients = 0  # in a row
        self._versions: dict[Tensor, int] = {}  # of the weights, as the last step has left them
        self._changes = 0

    def begin(self, view: View) -> None:
        """Before a step, check what earlier steps have left."""
        if not self._steps:
            self._look_for_misuse(view)
        if self._versions:
            self._compare_versions(view)
        if self._sent is not None:
            sent = self._sent
            if sent.event is None or (not is_captured(sent.event.device) and sent.event.query()):
                self._sent = None
                self._read(sent)

    def _look_for_misuse(self, view: View) -> None:
        """Before the first step, warn of what trains wrongly from the beginning."""
        first: dict[Hashable, Location] = {}
        for location in locations(view.groups):
            local = view.placement.local(location.p)
            has_memory = local.layout is torch.strided and not local.is_meta and local.numel() > 0
            if type(local) not in (Tensor, nn.Parameter) or not has_memory:
                continue
            other = first.setdefault(memory_of(local), location)
            if other.p is not location.p:
                names = " and ".join(one.name_in(view.groups) for one in (other, location))
                self._warner.warn(
                    f"{names} share memory: each step moves it twice, and their average is wrong. Tie layers "
                    "by the parameter itself, as b.weight = a.weight, not by its .data.",
                    what="memory",
                )
        if is_called_from("torch.distributed.optim.post_localSGD_optimizer"):
            self._warner.warn(
                "PostLocalSGDOptimizer averages the weights of ranks, but each rank finds a step size and an "
                "average of its own: use DistributedDataParallel without it."
            )

    def end(self, view: View, groups: Groups, exchange: Exchange, *, in_backward: bool) -> None:
        """After a step, note what to check later.

        Args:
            view: The optimiser.
            groups: The groups as the step has left them.
            exchange: What has completed its sums.
            in_backward: Whether a backward pass has moved parameters, so that their gradients are gone.
        """
        self._steps += 1
        is_without = not in_backward and view.lacks_gradients()
        self._steps_without_gradients = self._steps_without_gradients + 1 if is_without else 0
        if self._steps_without_gradients == _MOST_WITHOUT_GRADIENTS:
            self._warner.warn(
                f"none of the optimiser's parameters has had a gradient in {_MOST_WITHOUT_GRADIENTS} "
                "steps, so nothing is trained. Give it the parameters of the model that is trained, after "
                "wrapping the model: fully_shard and parallelize_module replace parameters by new ones. "
                "Call backward() before step(), and zero_grad() before backward(). Under FSDP2, the last "
                "backward pass before a step must reduce gradients: set_requires_gradient_sync(True).",
                what="gradients",
            )
        self._compare_lrs(groups)
        self._compare_betas(groups)
        if self._changes < _MOST_CHANGES and self._steps % _WEIGHTS_EVERY == 1:
            self._versions = {p: version_of(weight) for p, weight in view.own_weights()}
        if self._steps % _NUMBERS_EVERY == 0 and self._sent is None:
            self._sent = _sent_to_host(groups, exchange.differing())

    def forget_weights(self) -> None:
        """Forget the versions of weights, since the optimiser itself changes weights between two steps."""
        self._versions = {}

    def _compare_versions(self, view: View) -> None:
        versions, self._versions = self._versions, {}
        changed = [p for p, weight in view.own_weights() if versions.get(p, now := version_of(weight)) != now]
        self._changes += bool(changed)
        if changed and self._changes == _MOST_CHANGES:
            self._warner.warn(
                f"{view.name_of(changed[0])} was changed between two steps, and not by the optimiser "
                f"({len(changed)} of its parameters were); this has happened several times. Changes by "
                "clamp_(), max_norm or renormalisation do not reach the average that is evaluated, and are "
                "mistaken for progress: call optimizer.constrain(parameters, projection) once instead. See "
                "docs/constraints.md. So are changes by another optimiser that has the same parameter: give "
                "each parameter to one. (Weights that are swapped for others and put back, as an EMA's, do "
                "no harm.)",
                what="weights",
            )

    def _compare_lrs(self, groups: Groups) -> None:
        fallen = None
        for group in groups.group_steps:
            lr, index = group.options.lr, group.index
            if not isinstance(lr, Tensor) and lr > 0 and group.options.use_schedulefree:  # 0: held still
                highest = self._highest_lr[index] = max(lr, self._highest_lr.get(index, lr))
                fallen = (index, highest, lr) if lr < _LEAST_LR * highest else fallen
        self._steps_below = 0 if fallen is None else self._steps_below + 1
        if fallen is not None and self._steps_below == _MOST_STEPS_BELOW:
            index, highest, lr = fallen
            self._warner.warn(
                f"lr of param_groups[{index}] has fallen from {highest:.3g} to {lr:.3g}. Schedule-Free's "
                "average does what a schedule that decays is for; with both, the weights stop moving too "
                "early. Hold lr constant, after a warm-up if you like (a Hugging Face Trainer: "
                'lr_scheduler_type="constant"), and leave out ReduceLROnPlateau; or keep the schedule with '
                "use_schedulefree=False.",
                what="schedule",
            )

    def _compare_betas(self, groups: Groups) -> None:
        before, self._beta1 = self._beta1, [group.options.betas[0] for group in groups.group_steps]
        # Groups are only added at the end.
        pairs = zip(groups.group_steps, before, self._beta1, strict=False)
        changed = [(g.index, old, new) for g, old, new in pairs if old != new and g.options.use_schedulefree]
        self._changes_of_beta1 += bool(changed)
        if changed and self._changes_of_beta1 == _MOST_CHANGES_OF_BETA1:
            index, old, new = changed[0]
            self._warner.warn(
                f"betas[0] of param_groups[{index}] has changed several times, now from {old:.3g} to "
                f"{new:.3g}. The averaged weights are computed from it, so that each change moves them. "
                "Hold it constant (OneCycleLR: cycle_momentum=False), or pass use_schedulefree=False.",
                what="betas",
            )

    def _read(self, sent: _Sent) -> None:
        """Check numbers that have arrived."""
        counts: list[list[int]] = sent.counts.tolist()
        in_mean, d = sent.sizes.tolist()
        self._look_for_growth([k for k, _ in counts], d, sent.d0)
        self._look_for_skipped_steps(counts)
        self._look_for_differences({name: value.tolist() for name, value in sent.differing.items()})
        sizes = {index: d[index] for index in sent.sharing if in_mean[index] > 0}
        if sizes and max(sizes.values()) > _FURTHEST_APART * min(sizes.values()):
            low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
            self._warner.warn(
                f"the step sizes of parameter groups are far apart: d is {sizes[low]:.1e} in "
                f"param_groups[{low}] and {sizes[high]:.1e} in param_groups[{high}], but both move by the "
                "harmonic mean of all. If they are parts of one network, pass split_groups=False; if not, "
                "split_groups_mean=False lets each move by its own.",
                what="groups",
            )

    def _look_for_skipped_steps(self, counts: list[list[int]]) -> None:
        """Warn if a group has skipped many steps in a row; ``counts`` are k and skipped of each."""
        if len(self._moved_at) != len(counts):
            self._moved_at = [(k, skipped) for k, skipped in counts]
        for index, (k, skipped) in enumerate(counts):
            known_k, known_skipped = self._moved_at[index]
            if k != known_k:
                self._moved_at[index] = k, skipped
            elif skipped - known_skipped >= _MOST_SKIPPED:
                self._warner.warn(
                    f"the last {_MOST_SKIPPED} steps or more were all skipped: each met an inf or NaN in a "
                    "gradient, and nothing is trained. Look for the layer that makes it "
                    "(torch.autograd.detect_anomaly), lower the scale of the loss, or go on from an earlier "
                    "checkpoint.",
                    what="skipped",
                )

    def _look_for_differences(self, differing: Mapping[str, Any]) -> None:
        """Warn if ranks differ, as :meth:`prodigyplus.exchange.Exchange.differing` says."""
        if differing.get("gradients"):
            self._warner.warn(
                "gradients of parameters that are plain tensors, whole on every rank, differ between ranks, "
                "so that each rank trains another model. Average them over the ranks before step(), as DDP "
                "does and FSDP2 does not for its ignored_params.",
                what="gradients of copies",
            )
        elif True in (groups := differing.get("step_sizes", [])):
            self._warner.warn(
                f"the step size of param_groups[{groups.index(True)}] differs between ranks. Give all ranks "
                "the same options: an lr, for instance, must not follow each rank's own loss. "
                "optimizer.check_replicas() says what differs, and where.",
                what="ranks",
            )

    def _look_for_growth(self, steps: list[int], d: list[float], d0: list[float | None]) -> None:
        """Warn if d has not doubled in any of the groups in which it should grow."""
        should = [
            (k, now < 2 * first) for k, now, first in zip(steps, d, d0, strict=True) if first is not None
        ]
        if should and all(k >= _STEPS_TO_GROW and stays for k, stays in should):
            self._warner.warn(
                f"after {should[0][0]} steps the step size is still d0: the model has hardly moved. "
                "lr may be far below 1 (leave it at 1), gradients as small as eps (pass eps=None), d0 too "
                "small to change bfloat16 weights (pass d0=1e-5 or 1e-4), or gradients mostly noise (use a "
                "larger batch).",
                what="d0",
            )


class _Sent(NamedTuple):
    """Numbers of the groups on their way to the host."""

    counts: Tensor  # k and skipped of each group; (groups, 2)
    sizes: Tensor  # in_mean and d of each group; (2, groups)
    differing: dict[str, Tensor]  # see Exchange.differing
    sharing: list[int]  # the groups that move by the mean of several
    d0: list[float | None]  # of each group whose d should grow; None for others
    event: torch.Event | None = None  # recorded after the copies; None if the numbers are on the host already


def _sent_to_host(groups: Groups, differing: dict[str, Tensor]) -> _Sent | None:
    """Begin to copy the groups' numbers to the host; None if that is not possible."""
    columns = groups.columns
    home = columns.device
    if type(columns["d"]) is not Tensor or home.type == "meta" or is_captured(home):
        return None  # a graph's replays do not run this code
    sent = _Sent(
        torch.stack([columns["k"], columns["skipped"]], dim=1),
        torch.stack([columns["in_mean"], columns["d"]]),
        {name: value.to(home) for name, value in differing.items()},
        [group.index for group in groups.sharing],
        [g.options.d0 if g.adapts and g.options.d0 <= _SMALL_D0 else None for g in groups.group_steps],
    )
    if _is_on_host(home):
        return sent
    event = torch.Event(device=home)
    copied = {name: value.to("cpu", non_blocking=True) for name, value in sent.differing.items()}
    counts, sizes = (tensor.to("cpu", non_blocking=True) for tensor in (sent.counts, sent.sizes))
    event.record(torch.accelerator.current_stream(home))  # by default, that of the current device
    return sent._replace(counts=counts, sizes=sizes, differing=copied, event=event)


def _is_on_host(device: torch.device) -> bool:
    return device.type == "cpu"
