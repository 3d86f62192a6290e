"""Check state dicts before they are loaded; convert states to their saved form and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prodigyplus import options
from prodigyplus import state as states
from prodigyplus.engine.parameters import stored
from prodigyplus.exchange import Exchange
from prodigyplus.formulas import schedule_free
from prodigyplus.options import Options
from prodigyplus.placement import Placement, locations, name_of
from prodigyplus.reporting import warn_caller
from prodigyplus.state import StateOptions
from prodigyplus.terms import samples
from prodigyplus.terms.group_numbers import NUMBERS, first_numbers
from prodigyplus.terms.isolation import isolated
from prodigyplus.terms.requests import Asked

Group = Mapping[str, Any]
"""An entry of ``param_groups``."""

WEIGHTS = "weights"
"""The key, in a parameter's saved state, of the weights that the state belongs to: y in train mode.

The Lightning integration adds this entry on saving, and removes it before the state is loaded.
"""


def new_entries(d0: float) -> dict[str, Any]:
    """The entries of a group that has made no step, other than its parameters and options.

    ==================  ==========================================================================
    the numbers         of :func:`prodigyplus.terms.group_numbers.first_numbers`
    ``calls``           calls of ``step`` so far, except those with ``lr=0``
    ``frozen``          whether ``prodigy_steps`` has passed
    ``train_mode``      whether the model holds y, not its average x
    ``average_beta1``   in eval mode, the β1 with which x was computed from y
    ==================  ==========================================================================
    """
    numbers = first_numbers(d0)
    return {**numbers, "calls": 0, "frozen": False, "train_mode": True, "average_beta1": None}


ENTRIES = tuple(new_entries(1.0))


# Entries that state dicts of earlier versions lack, and the values that they get.
_LATER_ENTRIES: dict[str, Callable[[Group], Any]] = {
    "in_mean": lambda group: 0.0,  # the group joins the mean at the next step, if it should
    "frozen": lambda group: Options.of(group).freezes(group["calls"]),
    "average_beta1": lambda group: None,
}


def check_is_state_dict(state_dict: Mapping[str, Any]) -> None:
    """Check that this is the state dict of an optimiser.

    Raises:
        ValueError: It lacks "state" or "param_groups".
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the state dict has no {key!r}: pass what state_dict() gave.")


def checked_groups(state_dict: Group, own: Sequence[Group], defaults: Group) -> list[dict[str, Any]]:
    """The groups of a state dict, completed, and with validated options.

    Args:
        state_dict: The state dict to load.
        own: The groups of the optimiser to load it into.
        defaults: The optimiser's ``defaults``, for options that were added after the state dict was saved.

    Raises:
        ValueError: The groups do not fit this optimiser.
    """
    check_is_state_dict(state_dict)
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
        if missing := {"d0", *NUMBERS} - _LATER_ENTRIES.keys() - theirs.keys():
            why = (
                "it is not of this optimiser."
                if theirs["params"]
                else "torch's set_optimizer_state_dict loses what a group without parameters has, unless it "
                "is the last. Put it last, leave it out, or save and load optimizer.state_dict()."
            )
            raise ValueError(
                f"param_groups[{index}] of the state dict has no {', '.join(sorted(missing))}: {why}"
            )
        # Only our own keys: torch puts some of its own among the defaults.
        group = {**{name: defaults[name] for name in options.NAMES}, **theirs}
        # Where gradients are consumed, and how steps are computed, belongs to the run, not to its state.
        group |= {key: ours[key] for key in ("fused_back_pass", "compile", "fused")}
        group |= options.plain(group)
        group |= {name: value(group) for name, value in _LATER_ENTRIES.items() if name not in theirs}
        group |= _in_our_order(theirs, ours, index)
        groups.append(group)
    return groups


# What wrappers of a model call what they wrap. The first is also an ordinary name of a submodule.
_MODULE = "module"
_WRAPPED = (_MODULE, "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def parallel_wrappers(model: nn.Module) -> frozenset[str]:
    """The paths within a model of torch's wrappers whose ``module`` is what they wrap."""
    parallel = nn.DataParallel, nn.parallel.DistributedDataParallel
    modules = model.named_modules(remove_duplicate=False)
    return frozenset(path for path, module in modules if isinstance(module, parallel))


def unwrapped(name: str, wrappers: Collection[str] | None = None) -> str:
    """A parameter's name in the unwrapped model.

    Args:
        name: Its name in the wrapped model.
        wrappers: The result of :func:`parallel_wrappers`. None: the model is not known, and every ``module``
            in the name passes for a wrapper's.
    """
    parts = name.split(".")
    kept = [
        part
        for index, part in enumerate(parts)
        if part not in _WRAPPED
        or (part == _MODULE and wrappers is not None and ".".join(parts[:index]) not in wrappers)
    ]
    return ".".join(kept)


def _in_our_order(theirs: Group, ours: Group, index: int) -> dict[str, Any]:
    """A saved group's keys and names of parameters, in our order; empty unless both groups have names.

    Raises:
        ValueError: The names differ.
    """
    if "param_names" not in theirs or "param_names" not in ours:
        return {}
    names = {"param_names": list(ours["param_names"])}
    if any(isinstance(key, str) for key in theirs["params"]):
        return names  # torch's checkpoint helpers use names as keys, and have already ordered them as ours

    found, wanted = ([unwrapped(name) for name in group["param_names"]] for group in (theirs, ours))
    if sorted(found) != sorted(wanted):
        missing, foreign = (sorted({*one} - {*other}) for one, other in ((wanted, found), (found, wanted)))
        raise ValueError(
            f"param_groups[{index}] of the state dict has other parameters than the optimiser: of the "
            f"optimiser's it lacks {', '.join(missing[:3]) or 'none'}, and it has {', '.join(foreign[:3])}. "
            "Load it into the model it was saved with; if parameters have only been renamed, delete "
            '"param_names" from the groups of the state dict, and they are taken in their order.'
        )
    if len({*found}) < len(found):
        return names
    keys = dict(zip(found, theirs["params"], strict=True))
    return {"params": [keys[name] for name in wanted], **names}


def checked_states(
    saved: Mapping[Any, Mapping[str, Tensor]], groups: Sequence[dict[str, Any]], own: Sequence[Group]
) -> dict[int, dict[str, Tensor]]:
    """The states of a state dict by their parameter's index, from 0; without parameters that have none.

    Args:
        saved: The states, by their parameters' keys in ``groups``.
        groups: The groups of the state dict (see :func:`checked_groups`). ``bfloat16_z`` is switched off in
            groups whose states hold z itself, in bfloat16, as earlier versions saved it.
        own: The groups of the optimiser to load it into.

    Raises:
        ValueError: A state does not fit its parameter.
    """
    found = {}
    offset = 0  # the index of a group's first parameter
    for index, (theirs, ours) in enumerate(zip(groups, own, strict=True)):
        have_state = [bool(saved.get(key)) for key in theirs["params"]]
        if theirs["k"] and not any(have_state) and any(p.requires_grad for p in ours["params"]):
            raise ValueError(
                f"param_groups[{index}] of the state dict has made {theirs['k']} steps, but none of its "
                "parameters has state. torch's set_optimizer_state_dict loses it where parameters have "
                "gradients: call optimizer.zero_grad() before."
            )
        if theirs["bfloat16_z"] and any(
            schedule_free.BASE in saved.get(key, ()) and p.dtype == torch.float32
            for key, p in zip(theirs["params"], ours["params"], strict=True)
        ):
            theirs["bfloat16_z"] = False
            warn_caller(
                f"param_groups[{index}] of the state dict has z, not its distance from the weights, which "
                "bfloat16_z=True keeps: it goes on with z as it is, and bfloat16_z=False."
            )
        for in_group, (key, p) in enumerate(zip(theirs["params"], ours["params"], strict=True)):
            if have_state[in_group]:
                _check_state(saved[key], p, theirs, name_of(ours, index, in_group))
                found[offset + in_group] = dict(saved[key])
        offset += len(ours["params"])
    return found


def _check_state(saved: Mapping[str, Tensor], p: Tensor, group: Group, name: str) -> None:
    o, shape = Options.of(group), tuple(p.shape)
    expected = states.entries_of(states.Subject(p.dtype, p.dtype, p.device, shape, StateOptions.of(o)))
    freed = states.EVIDENCE if o.is_frozen(group) else ()
    if set(saved).symmetric_difference(expected) - set(freed):
        raise ValueError(
            f"{name}: the state dict holds {sorted(saved)}, this optimiser needs {sorted(expected)}: it was "
            "saved by another optimiser, or with other options."
            + (
                " The weights are in it as ScheduleFreeCallback (of the Lightning integration) saves them: "
                "resume with that callback in the trainer."
                if WEIGHTS in saved
                else ""
            )
        )
    for key, value in saved.items():
        needed = states.TABLE[key].saved_shape(shape, o.slice_p)
        found = tuple(value.shape) if isinstance(value, Tensor) else None
        if found != needed:
            raise ValueError(
                f"{name}: {key!r} of the state dict "
                + (f"is of {type(value)}" if found is None else f"has shape {found}")
                + f", but a parameter of shape {shape} needs {needed}: load it into the model it was saved "
                "with."
            )
        if value.dtype not in states.DTYPES:
            raise ValueError(
                f"{name}: {key!r} of the state dict is {value.dtype}, which cannot hold it: load the state "
                "dict in the dtypes it was saved in."
            )


class _Kept(NamedTuple):
    """A parameter whose state is to be saved."""

    saved_as: int  # its key in the state dict, from 0
    p: Tensor
    every: int  # the distance between samples
    state: Mapping[str, Tensor]


def _kept(
    groups: Sequence[Group], state: Mapping[Tensor, Mapping[str, Tensor]], placement: Placement
) -> Iterator[_Kept]:
    last = {location.p: location.ordinal for location in locations(groups)}  # of one given twice, the last
    for location in locations(groups):
        p, group = location.p, groups[location.group]
        if p in state and last[p] == location.ordinal:
            o, entries = Options.of(group), state[p]
            if entries and o.is_frozen(group):
                freed = states.freed_state(placement.local(p), placement.layout(p), StateOptions.of(o))
                entries = {**entries, **stored(placement, p, freed, o.slice_p)}
            yield _Kept(location.ordinal - 1, p, o.slice_p, entries)


@isolated
def saved_states(
    groups: Sequence[Group],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    placement: Placement,
    exchange: Exchange,
) -> dict[int, dict[str, Tensor]]:
    """All states in their saved form, by the parameters' indices, with samples as rows.

    Args:
        groups: ``param_groups``.
        state: The optimiser's ``state``.
        placement: Where the tensors lie.
        exchange: Completes rows whose columns are on several ranks.
    """
    kept = list(_kept(groups, state, placement))
    asked: list[Asked] = []
    for _, p, every, entries in kept:
        layout = placement.layout(p)
        rows = {key: samples.spread(entries[key], layout, every) for key in states.SAMPLED if key in entries}
        asked.append({key: layout.sum(value, layout.dims[-1:]) for key, value in rows.items()})
    # Clones: when torch copies a state for an asynchronous save, it does not copy 0-dim DTensors, and fails
    # on views; rows that the exchange has completed are views into one buffer.
    return {
        saved_as: {
            **{key: value if value.ndim else value.clone() for key, value in entries.items()},
            **{key: placement.store(p, value.clone(), key, every) for key, value in rows.items()},
        }
        for (saved_as, p, every, entries), rows in zip(kept, exchange.complete(asked)(), strict=True)
    }


@isolated
def loaded_state(
    p: Tensor, saved: Mapping[str, Tensor], group: Group, placement: Placement
) -> dict[str, Tensor]:
    """A parameter's state as the optimiser keeps it, from its saved form: undoes :func:`saved_states`."""
    o = Options.of(group)
    every, frozen = o.slice_p, o.is_frozen(group)
    needed = {key: value for key, value in saved.items() if not (frozen and key in states.EVIDENCE)}
    pieces = {key: placement.load(p, value, key, every) for key, value in needed.items()}
    if "p0" in pieces:  # earlier versions kept it in bfloat16
        pieces["p0"] = pieces["p0"].to(torch.promote_types(pieces["p0"].dtype, p.dtype))
    return {
        key: samples.collect(piece, placement.layout(p), every)
        if key in states.SAMPLED
        else placement.store(p, piece, key, every)
        for key, piece in pieces.items()
    }


def taken_apart(
    state_dict: Group, own: Sequence[Group], defaults: Group, placement: Placement
) -> tuple[list[dict[str, Any]], dict[Any, Any], dict[Tensor, dict[str, Tensor]]]:
    """Check a state dict, and split it into the parts that the optimiser loads.

    Args:
        state_dict, own, defaults: As for :func:`checked_groups`.
        placement: Where the tensors lie.

    Returns:
        The groups; the entries of ``state`` that belong to no parameter; and the parameters' states as they
        are kept.

    Raises:
        ValueError: The state dict does not fit this optimiser.
    """
    groups = checked_groups(state_dict, own, defaults)
    saved = state_dict["state"]
    states_by_index = checked_states(saved, groups, own)
    group_of = [group for group in groups for _ in group["params"]]
    loaded = {
        location.p: loaded_state(location.p, states_by_index[index], group_of[index], placement)
        for index, location in enumerate(locations(own))
        if index in states_by_index
    }
    keys = {key for group in groups for key in group["params"]}
    return groups, {key: value for key, value in saved.items() if key not in keys}, loaded
