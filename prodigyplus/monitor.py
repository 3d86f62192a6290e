"""What a run should be told of, noticed from what steps leave behind, a step late and without a wait.

Numbers of the groups are looked at every so many steps: they are sent to the host then, and read at a later
step once they have come. Each finding is one warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from prodigyplus.engine.groups import Groups
from prodigyplus.reporting import warn_caller
from prodigyplus.terms.isolation import is_captured
from prodigyplus.torch_private import version_of

# Every so many steps numbers are looked at, and after so many it is looked whether weights stay as they were
# left.
_NUMBERS_EVERY, _WEIGHTS_EVERY = 50, 10

# How many steps may be skipped in a row, and how far step sizes that share a mean may be apart.
_MOST_SKIPPED, _FURTHEST_APART = 500, 100.0

# How often weights have to have been changed: once may be a checkpoint that was loaded.
_MOST_CHANGES = 3


class Watched(Protocol):
    """What a monitor asks of an optimiser. It is handed over at each call: to keep it would keep it alive."""

    def own_weights(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The parameters that nothing but the optimiser should change, and their local tensors."""
        ...

    def name_of(self, p: Tensor) -> str:
        """What to call a parameter."""
        ...


class Monitor:
    """Looks at an optimiser's steps."""

    def __init__(self) -> None:
        self._steps = 0
        self._sent: tuple[Tensor, Tensor, torch.Event | None] | None = None
        self._moved_at: list[
            tuple[int, int]
        ] = []  # of each group, k and skipped when k was last seen to grow
        self._told: set[str] = set()
        self._versions: dict[Tensor, int] = {}  # of the weights, as the last step has left them
        self._changes = 0

    def begin(self, watched: Watched) -> None:
        """Look at what steps before have left, before a step."""
        if self._versions:
            self._compare_versions(watched)
        if self._sent is not None:
            counts, step_sizes, event = self._sent
            if event is None or (not is_captured(event.device) and event.query()):
                self._sent = None
                self._read(counts.tolist(), step_sizes.tolist())

    def end(self, watched: Watched, groups: Groups) -> None:
        """Note what is to be looked at later, after a step.

        Args:
            watched: The optimiser.
            groups: The groups as the step has left them.
        """
        self._steps += 1
        if self._changes < _MOST_CHANGES and self._steps % _WEIGHTS_EVERY == 1:
            self._versions = {p: version_of(weight) for p, weight in watched.own_weights()}
        if self._steps % _NUMBERS_EVERY == 0 and self._sent is None:
            self._sent = _sent_to_host(groups)

    def forget_weights(self) -> None:
        """Be told that the optimiser itself changes weights between two steps."""
        self._versions = {}

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warn_caller(message)

    def _compare_versions(self, watched: Watched) -> None:
        versions, self._versions = self._versions, {}
        changed = [
            p for p, weight in watched.own_weights() if versions.get(p, now := version_of(weight)) != now
        ]
        self._changes += bool(changed)
        if changed and self._changes == _MOST_CHANGES:
            self._tell(
                "weights",
                f"{watched.name_of(changed[0])} was changed between two steps, several times, and not by the "
                f"optimiser ({len(changed)} of its parameters were). What clamp_(), max_norm or a "
                "renormalisation does to the weights does not reach the average that is evaluated, and "
                "passes for progress: call optimizer.constrain(parameters, projection) once in its place. "
                "See docs/constraints.md.",
            )

    def _read(self, counts: list[list[int]], step_sizes: list[float]) -> None:
        """Look at numbers that have come.

        Args:
            counts: Of each group, k and skipped.
            step_sizes: Of each group that counts in a mean of several, d; of the others, nan.
        """
        if len(self._moved_at) != len(counts):
            self._moved_at = [(k, skipped) for k, skipped in counts]
        for index, (k, skipped) in enumerate(counts):
            known_k, known_skipped = self._moved_at[index]
            if k != known_k:
                self._moved_at[index] = k, skipped
            elif skipped - known_skipped >= _MOST_SKIPPED:
                self._tell(
                    "skipped",
                    f"the last {_MOST_SKIPPED} steps or more were all skipped: each met an inf or NaN in a "
                    "gradient, and nothing is trained. Look for the layer that makes it "
                    "(torch.autograd.detect_anomaly), lower the scale of the loss, or go on from an earlier "
                    "checkpoint.",
                )
        sizes = {index: d for index, d in enumerate(step_sizes) if not math.isnan(d)}
        if sizes and max(sizes.values()) > _FURTHEST_APART * min(sizes.values()):
            low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
            self._tell(
                "groups",
                f"the step sizes of parameter groups are far apart: d is {sizes[low]:.1e} in "
                f"param_groups[{low}] and {sizes[high]:.1e} in param_groups[{high}], and both move by the "
                "harmonic mean of all. If they are parts of one network, pass split_groups=False; if not, "
                "split_groups_mean=False lets each move by its own.",
            )


def _sent_to_host(groups: Groups) -> tuple[Tensor, Tensor, torch.Event | None] | None:
    """Begin to send numbers of the groups to the host, see :meth:`Monitor._read`; None if that cannot be."""
    columns = groups.columns
    home = columns.device
    if type(columns["d"]) is not Tensor or home.type == "meta" or is_captured(home):
        return None  # a look into a graph would be no part of its replays
    counts = torch.stack([columns["k"], columns["skipped"]], dim=1)
    step_sizes = groups.in_mean_or_nan()
    if _is_on_host(home):
        return counts, step_sizes, None
    event = torch.Event(device=home)
    on_host = [tensor.to("cpu", non_blocking=True) for tensor in (counts, step_sizes)]
    event.record()
    return on_host[0], on_host[1], event


def _is_on_host(device: torch.device) -> bool:
    return device.type == "cpu"
