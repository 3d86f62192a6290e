"""The steps of an optimiser: which parameters take part in each, and what is kept for the next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from prodigyplus.engine.bundle import Bundle
from prodigyplus.engine.columns import Columns
from prodigyplus.engine.param_step import ParamStep
from prodigyplus.engine.parameters import Parameters
from prodigyplus.engine.reusable_batches import ReusableBatches
from prodigyplus.engine.step import Step
from prodigyplus.exchange import Exchange
from prodigyplus.options import Options
from prodigyplus.placement import Location, locations
from prodigyplus.state_table import StateOptions, restart_
from prodigyplus.terms.device_constants import Constants
from prodigyplus.terms.isolation import is_captured, isolated
from prodigyplus.view import View


class Steps:
    """Begins and ends the steps of an optimiser. Every call takes a view of the optimiser.

    Attributes:
        current: A step that a backward pass has begun, and that has not ended; else None.
        reusable: Batches that the next step may reuse, or None.
        constants: What is the same at every step.
    """

    def __init__(self) -> None:
        self.current: Step | None = None
        self.reusable: ReusableBatches | None = None
        self.constants = Constants()
        self._columns: Columns | None = None
        self._made_for: dict[Tensor, Any] = {}  # see engine/parameters.py
        self._listed: tuple[object, list[Location]] = (None, [])  # a key, and the locations it stands for
        self._location_of: dict[Tensor, Location] = {}  # of the current step's parameters

    def begin(self, view: View, exchange: Exchange, *, in_backward: bool) -> Step:
        """Begin a step; see :class:`prodigyplus.engine.step.Step`."""
        columns = self.columns(view)
        if is_captured(columns.device):
            self.constants.keep_for_graph(columns)
        step = Step(view.groups, columns, exchange, self.constants, in_backward=in_backward)
        for group in step.groups.group_steps:
            if group.param_group["calls"] == 0:  # state, if there is any, may be older than the weights
                for p in filter(view.state.get, group.param_group["params"]):
                    weight, state = view.placement.local(p), view.placement.local_state(view.state[p])
                    restart_(state, weight, view.placement.layout(p), group.options.slice_p)
        return step

    def location(self, view: View, p: Tensor) -> Location | None:
        """The location of a parameter within a backward pass; None if the optimiser does not have it."""
        if self.current is None:
            self._location_of = {location.p: location for location in self._locations(view)}
        return self._location_of.get(p)

    def take(self, view: View, step: Step, location: Location, grad: Tensor) -> None:
        """Move a parameter within a backward pass, now or later in the step."""
        group = step.groups.group_steps[location.group]
        step.take(location.p, self._parameters(view).bring(location, grad, group))

    def end(self, view: View, step: Step) -> None:
        """Move what has not moved yet, and update the step sizes; in eval mode, only make state."""
        reused = self._reused(view, step)
        if reused is None:
            self.constants.forget_unused_()
        bundles = step.bundled(self._remaining(view, step)) if reused is None else reused.batches
        # Before anything moves: what is frozen from now on takes part once more.
        view.placement.remember_trained(location.p for location in self._locations(view))
        if not view.is_evaluating:
            step.close(bundles)
            reused = reused or self._reusable_after(view, step, bundles)
        if reused is not None:
            reused.drop_tensors_()
        # Kept only if the step did not raise.
        self.reusable = reused

    def _reused(self, view: View, step: Step) -> ReusableBatches | None:
        """The last step's batches with this step's gradients; None if more than gradients has changed."""
        reusable, self.reusable = self.reusable, None
        if reusable is None or not _can_reuse(step):
            return None
        is_current = reusable.reuse_(self._locations(view), step.groups.group_steps, view.state)
        return reusable if is_current else None

    def _reusable_after(self, view: View, step: Step, bundles: Sequence[Bundle]) -> ReusableBatches | None:
        if not _can_reuse(step):
            return None
        return ReusableBatches.of(
            view.placement, self._locations(view), step.groups.group_steps, view.state, bundles
        )

    def _remaining(self, view: View, step: Step) -> list[ParamStep]:
        """What a step needs of the parameters that no backward pass has moved."""
        parameters = self._parameters(view)
        parameters.forget_replaced()
        every = self._locations(view)
        left = [location for location in every if location.p not in step.taken] if step.taken else every
        takes_part, groups = view.placement.takes_part, step.groups.group_steps
        return [
            parameters.bring(location, location.p.grad, groups[location.group])
            for location in left
            if takes_part(location.p)
        ]

    def _locations(self, view: View) -> list[Location]:
        """The locations of all parameters, listed again only when ``param_groups`` has other parameters."""
        key = [list(map(id, group["params"])) for group in view.groups]
        if key != self._listed[0]:  # the list keeps them alive, so that no id is reused
            self._listed = key, locations(view.groups)
        return self._listed[1]

    def _parameters(self, view: View) -> Parameters:
        return Parameters(view.groups, view.state, view.placement, self._made_for)

    def note_loaded(self, view: View, loaded: Collection[Tensor]) -> None:
        """Note that the states of these parameters, and of no others, fit them: they have been loaded."""
        self._made_for.clear()
        self.reusable = None  # which would keep the states alive that have been replaced
        parameters = self._parameters(view)
        # Not listed for the next step: accelerate loads a state before it shards, and frees these parameters.
        for location in locations(view.groups):
            if location.p in loaded:
                parameters.note_fit(location.p, StateOptions.of(Options.of(view.groups[location.group])))

    @isolated
    def columns(self, view: View) -> Columns:
        """The groups' numbers, on the device of the parameters that are trained."""
        home = _home_of(view)
        if self._columns is None or not self._columns.are_of(view.groups, home):
            self._columns = Columns(view.groups, home)
        return self._columns


def _can_reuse(step: Step) -> bool:
    return not step.taken and not is_captured(step.groups.columns.device)


def _home_of(view: View) -> torch.device:
    """The device for the groups' numbers: usually, that of the first parameter.

    What is on "meta" may get memory elsewhere before it is trained, and numbers cannot follow it from there;
    but a step may be simulated there.
    """
    groups, local = view.groups, view.placement.local
    trained = (p for g in groups for p in g["params"] if p.requires_grad or p.grad is not None)
    others = (p for g in groups for p in g["params"])
    homes = (local(p).device for some in (trained, others) for p in some)
    simulated = (local(p).device for g in groups for p in g["params"] if p.grad is not None)
    home = next((device for device in homes if device.type != "meta"), None)
    return home or next(simulated, torch.device("cpu"))
