"""What a step needs of each parameter: its local tensors, and its state, created if there is none yet.

Parameters that cannot be trained are refused here, by what every rank knows, so that no rank waits for
another in vain. (Not so a gradient that cannot be used, such as a sparse one: where only some ranks have it,
the others wait until their timeout.)
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prodigyplus import state_table
from prodigyplus.engine.batches import obstacle
from prodigyplus.engine.group_step import GroupStep
from prodigyplus.engine.param_step import ParamStep
from prodigyplus.options import Options
from prodigyplus.placement import Location, Placement
from prodigyplus.state_table import DTYPES, StateOptions
from prodigyplus.terms.dtypes import compute_dtype
from prodigyplus.terms.layout import Layout


class _MadeFor(NamedTuple):
    """What the state of a parameter was made for, and so fits."""

    layout: Layout
    options: StateOptions
    entries: int  # how many it had

    def fits(self, layout: Layout, options: StateOptions, entries: int) -> bool:
        """Whether a state of so many entries fits a parameter of this layout, under these options."""
        # Prodigy's evidence may have been freed since, but nothing can have come.
        is_of_layout = self.layout is layout or self.layout == layout
        return is_of_layout and self.options == options and self.entries >= entries


class Parameters:
    """The parameters of an optimiser, and their states.

    Args:
        groups: ``param_groups``.
        state: The optimiser's ``state``.
        placement: Where the tensors lie.
        made_for: What each state was made for; kept from step to step.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        state: MutableMapping[Tensor, dict[str, Tensor]],
        placement: Placement,
        made_for: dict[Tensor, _MadeFor],
    ) -> None:
        self._groups = groups
        self._state = state
        self._placement = placement
        self._made_for = made_for

    def name(self, location: Location) -> str:
        """What to call a parameter in a message."""
        return location.name_in(self._groups)

    def bring(self, location: Location, grad: Tensor | None, group: GroupStep) -> ParamStep:
        """Gather what a step needs of a parameter.

        Args:
            location: The parameter.
            grad: Its gradient; None if it has none here.
            group: Its group.

        Raises:
            RuntimeError: The parameter cannot be trained with this gradient or state.
            ValueError: It cannot be trained at all, as its group says.
        """
        p, local = location.p, self._placement.local
        gradient, present = self._placement.gradient(location, grad, self.name)
        self._check_can_be_trained(location, gradient, group, has_gradient=grad is not None)
        # The memory of a negative view holds its values with the opposite sign.
        weight, gradient, layout = local(p), local(gradient).resolve_neg(), self._placement.layout(p)
        state = self._fitting_state_(location, weight, gradient, layout, group)
        if not group.adapts:
            for key in state_table.EVIDENCE_KEYS:
                state.pop(key, None)
        local_state = self._placement.local_state(state)
        return ParamStep(weight, gradient, local_state, layout, group, location.ordinal, present)

    def _check_can_be_trained(
        self, location: Location, gradient: Tensor, group: GroupStep, *, has_gradient: bool
    ) -> None:
        p, is_new = location.p, not self._state[location.p]
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"{self.name(location)} has a sparse gradient, which this optimiser cannot use: build its "
                "layer with sparse=False."
            )
        if p.is_meta and not has_gradient:
            raise RuntimeError(
                f"{self.name(location)} is on the meta device, without values or a gradient: the model has "
                "another in its place, as after load_state_dict(assign=True). Build the optimiser afterwards."
            )
        if is_new:
            self._placement.check(p, self.name(location))
        if is_new or p.dtype not in DTYPES:
            check_parameter(p, group.options, self.name(location))
        if not _fits(gradient.dtype, compute_dtype(p)):
            raise RuntimeError(
                f"{self.name(location)} is {p.dtype}, but its gradient {gradient.dtype}: give it one of the "
                "parameter's dtype, or of bfloat16 beside float32."
            )

    def _fitting_state_(
        self, location: Location, weight: Tensor, grad: Tensor, layout: Layout, group: GroupStep
    ) -> dict[str, Tensor]:
        """The state of a parameter: made if there is none yet, checked if it may not fit."""
        p, state, options = location.p, self._state[location.p], group.state_options
        before = self._made_for.get(p)
        # Field by field: tuples made for every parameter at every step would keep the garbage collector busy.
        if state and before is not None and before.fits(layout, options, len(state)):
            return state
        if state:
            self._check_state(location, weight, grad, group)
        else:
            state.update(self.new_state(p, grad, options))
        self._made_for[p] = _MadeFor(layout, options, len(state))
        return state

    def new_state(self, p: Tensor, grad: Tensor, options: StateOptions) -> dict[str, Tensor]:
        """The state of a parameter before its first step, as it is kept; samples are plain tensors."""
        local = state_table.new_state(self._placement.local(p), grad, self._placement.layout(p), options)
        return stored(self._placement, p, local, options.slice_p)

    def note_fit(self, p: Tensor, options: StateOptions) -> None:
        """Note that the state of a parameter fits it, under these options."""
        self._made_for[p] = _MadeFor(self._placement.layout(p), options, len(self._state[p]))

    def forget_replaced(self) -> None:
        """Drop references to parameters that were replaced."""
        if len(self._made_for) > 2 * len(self._state):
            self._made_for.clear()

    def _check_state(self, location: Location, weight: Tensor, grad: Tensor, group: GroupStep) -> None:
        """Refuse a state that was made for other options, or for a parameter of another shape, or by others.

        Raises:
            RuntimeError: The state does not fit.
        """
        before = self._made_for.get(location.p)
        if before is not None:
            options = zip(StateOptions._fields, before.options, group.state_options, strict=True)
            for name, old, new in options:
                if old != new and name in group.param_group:
                    value, index = group.param_group[name], location.group
                    raise RuntimeError(
                        f"{name}={value!r} in param_groups[{index}], whose state was made under another "
                        "value: build another optimiser to change it."
                    )
        if foreign := self._state[location.p].keys() - state_table.TABLE.keys():
            raise RuntimeError(
                f"the state of {self.name(location)} has {sorted(foreign)}, which are not this optimiser's. "
                "It could not load them again: keep them in a dict of your own."
            )
        state, layout = (
            self._placement.local_state(self._state[location.p]),
            self._placement.layout(location.p),
        )
        needed = {
            key: shape
            for key, shape in state_table.expected_shapes(weight, grad, layout, group.state_options).items()
            if key in state or group.adapts or key not in state_table.EVIDENCE_KEYS
        }
        found = {key: tuple(value.shape) for key, value in state.items()}
        if found != needed:
            key = next(key for key in [*needed, *found] if found.get(key) != needed.get(key))
            shape = layout.shape
            was = (
                "" if before is None else f", and was of shape {before.layout.shape} when its state was made"
            )
            raise RuntimeError(
                f"{self.name(location)} is of shape {shape}{was}: it needs {key!r} of shape "
                f"{needed.get(key)} and has {found.get(key)}. A parameter that is cut or grown starts anew: "
                "put a new nn.Parameter in its place in param_groups, and take the state of the old one out "
                "with optimizer.state.pop(old)."
            )


@functools.cache
def _fits(grad: torch.dtype, arithmetic: torch.dtype) -> bool:
    """Whether gradients of a dtype can be used where the arithmetic is done in another."""
    return grad in DTYPES and torch.promote_types(grad, arithmetic) == arithmetic


def stored(placement: Placement, p: Tensor, local: dict[str, Tensor], slice_p: int) -> dict[str, Tensor]:
    """Entries of a state as they are kept, from their local pieces: samples stay as they are."""
    return {
        key: value if key in state_table.SAMPLED_KEYS else placement.store(p, value, key, slice_p)
        for key, value in local.items()
    }


def check_parameter(p: Tensor, o: Options, name: str) -> None:
    """Refuse a parameter that cannot be trained as its group says.

    Raises:
        ValueError: Its dtype, its shape or the options of its group do not allow it.
    """
    wrong = None
    if p.dtype not in DTYPES:
        wrong = (
            f"{p.dtype}; the optimiser trains {', '.join(map(str, DTYPES))}. Leave it out of params, "
            "convert it, or freeze it (requires_grad=False)."
        )
    elif o.use_muon_pp and p.ndim < 2:
        wrong = (
            f"of shape {tuple(p.shape)}, no matrix, but its group has use_muon_pp=True: put it into a "
            "group without, as prodigyplus.muon_groups(model) does."
        )
    elif o.fused and (why := obstacle(o, p.dtype, p.device)) is not None:
        wrong = f"in a group with fused=True, but {why}: pass fused=None, to use kernels where they can be."
    if wrong is not None:
        raise ValueError(f"{name} is {wrong}")
