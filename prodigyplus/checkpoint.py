"""What a state dict must be to be loaded, and how a group's numbers are put into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prodigyplus import options, progress, stepsize
from prodigyplus.layout import Layout
from prodigyplus.options import Options
from prodigyplus.rule import new_state, saved_form

Group = Mapping[str, Any]
"""An entry of ``param_groups``."""


def name_of(group: Group, index: int, number: int) -> str:
    """What to call a parameter in a message: its own name if it has one, or its place."""
    names = group.get("param_names")
    return f"parameter {names[number]!r}" if names else f"parameter {number} of param_groups[{index}]"


def make_plain(groups: Sequence[dict[str, Any]]) -> None:
    """Make the numbers of packed groups plain Python numbers: one wait for the device, not one a number."""
    places = [
        (group, name) for group in groups for name in stepsize.NUMBERS if isinstance(group[name], Tensor)
    ]
    if places:
        values = torch.stack([group[name].double() for group, name in places]).tolist()
        for (group, name), value in zip(places, values, strict=True):
            group[name] = int(value) if name in stepsize.COUNTS else value


def checked_groups(state_dict: Group, own: Sequence[Group], defaults: Group) -> list[dict[str, Any]]:
    """The groups of a state dict, complete and with options that can be.

    Args:
        state_dict: The state dict to load.
        own: The groups of the optimiser to load it into.
        defaults: The optimiser's, for options that came since the state dict was saved.

    Raises:
        ValueError: They are not groups of such an optimiser.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the state dict has no {key!r}: pass what state_dict() gave.")
    saved = state_dict["param_groups"]
    if len(saved) != len(own):
        raise ValueError(
            f"the state dict has {len(saved)} parameter groups, the optimiser {len(own)}: build the "
            "optimiser with the groups that it was saved with."
        )
    groups = []
    for index, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"param_groups[{index}] of the state dict has {len(theirs['params'])} parameters, the "
                f"optimiser's {len(ours['params'])}: build the optimiser with the parameters that it was "
                "saved with."
            )
        if missing := {"d0", *stepsize.NUMBERS} - theirs.keys():
            why = (
                "it is not of this optimiser."
                if theirs["params"]
                else "torch's set_optimizer_state_dict loses what a group without parameters has, unless it "
                "is the last. Put it last, leave it out, or save and load optimizer.state_dict()."
            )
            raise ValueError(
                f"param_groups[{index}] of the state dict has no {', '.join(sorted(missing))}: {why}"
            )
        # Where gradients are consumed, and how it is computed, is the run's, not the state's.
        group = {**defaults, **theirs, **{key: ours[key] for key in ("fused_back_pass", "compile")}}
        group["betas"] = tuple(group["betas"])  # some savers make lists of tuples
        options.validate(group)
        groups.append(group)
    return groups


def checked_states(
    saved: Mapping[Any, Mapping[str, Tensor]], groups: Sequence[Group], own: Sequence[Group]
) -> dict[int, dict[str, Tensor]]:
    """The states of a state dict by the number of their parameter, from 0, where they have one.

    Args:
        saved: The states by the keys of their parameters in ``groups``.
        groups: The groups of the state dict (see :func:`checked_groups`).
        own: The groups of the optimiser to load it into.

    Raises:
        ValueError: A state is not one of the parameter that it is for.
    """
    states = {}
    number = 0
    for index, (theirs, ours) in enumerate(zip(groups, own, strict=True)):
        have_state = [bool(saved.get(key)) for key in theirs["params"]]
        if theirs["k"] and not any(have_state) and any(p.requires_grad for p in ours["params"]):
            raise ValueError(
                f"param_groups[{index}] of the state dict has made {theirs['k']} steps, but none of its "
                "parameters has state. torch's set_optimizer_state_dict loses it where parameters have "
                "gradients: call optimizer.zero_grad() before."
            )
        for place, (key, p) in enumerate(zip(theirs["params"], ours["params"], strict=True)):
            if have_state[place]:
                _check_state(saved[key], p, theirs, name_of(ours, index, place))
                states[number] = dict(saved[key])
            number += 1
    return states


def _check_state(saved: Mapping[str, Tensor], p: Tensor, group: Group, name: str) -> None:
    o, shape = Options.of(group), tuple(p.shape)
    meta = torch.empty(shape, dtype=p.dtype, device="meta")
    expected = new_state(meta, meta, Layout(shape), o).keys()
    freed = () if o.adapts(group["calls"]) else progress.STATE
    if set(saved).symmetric_difference(expected) - set(freed):
        raise ValueError(
            f"{name}: the state dict holds {sorted(saved)}, this optimiser needs {sorted(expected)}: it was "
            "saved by another optimiser, or with other options."
        )
    for key, value in saved.items():
        needed, _ = saved_form(key, shape, o.slice_p)
        found = tuple(value.shape) if isinstance(value, Tensor) else None
        if found != needed:
            raise ValueError(
                f"{name}: {key!r} of the state dict "
                + (f"is of {type(value)}" if found is None else f"has shape {found}")
                + f", but a parameter of shape {shape} needs {needed}: load it into the model it was saved "
                "with."
            )
