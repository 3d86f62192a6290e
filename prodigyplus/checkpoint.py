"""Check state dicts before they are loaded; convert states to their saved form and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prodigyplus import options, state_table
from prodigyplus.engine.parameters import stored
from prodigyplus.exchange import Exchange
from prodigyplus.formulas import schedule_free
from prodigyplus.options import Options
from prodigyplus.placement import Location, Placement, locations
from prodigyplus.reporting import warn_caller
from prodigyplus.state_table import StateOptions
from prodigyplus.terms import samples
from prodigyplus.terms.group_numbers import NUMBERS, first_numbers
from prodigyplus.terms.isolation import isolated
from prodigyplus.terms.requests import Asked

Group = Mapping[str, Any]
"""One of ``param_groups``."""

WEIGHTS = "weights"
"""The key, in a parameter's saved state, of the weights that the state belongs to: y in train mode.

The Lightning integration adds it on saving, and removes it before the state is loaded.
"""


def first_values(d0: float) -> dict[str, Any]:
    """What a group that has made no step holds beside its parameters and options.

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


KEYS = tuple(first_values(1.0))


# The keys that groups saved by earlier versions lack, and the values that they get.
_LATER_KEYS: dict[str, Callable[[Group], Any]] = {
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


def checked_groups(state_dict: Group, own: Sequence[Group]) -> list[dict[str, Any]]:
    """The groups of a state dict, completed, and with validated options.

    Args:
        state_dict: The state dict to load.
        own: The groups of the optimiser to load it into. They keep options that the state dict lacks, since
            they were added after it was saved.

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
    for index, (saved_group, own_group) in enumerate(zip(saved, own, strict=True)):
        if len(saved_group["params"]) != len(own_group["params"]):
            raise ValueError(
                f"param_groups[{index}] of the state dict has {len(saved_group['params'])} parameters, the "
                f"optimiser's {len(own_group['params'])}: build the optimiser with the parameters that it "
                "was saved with."
            )
        if missing := {"d0", *NUMBERS} - _LATER_KEYS.keys() - saved_group.keys():
            why = (
                "it is not of this optimiser. (Stages of a pipeline overwrite each other's groups in one "
                "checkpoint, except with flatten_optimizer_state_dict=True.)"
                if saved_group["params"]
                else "torch's set_optimizer_state_dict loses what a group without parameters has, unless it "
                "is the last. Put it last, leave it out, or save and load optimizer.state_dict()."
            )
            raise ValueError(
                f"param_groups[{index}] of the state dict has no {', '.join(sorted(missing))}: {why}"
            )
        group = {**{name: own_group[name] for name in options.NAMES}, **saved_group}
        # Where gradients are consumed, and how steps are computed, belongs to the run, not to its state.
        group |= {key: own_group[key] for key in ("fused_back_pass", "compile", "fused")}
        group |= options.plain(group)
        group |= {name: value(group) for name, value in _LATER_KEYS.items() if name not in saved_group}
        group |= _ordered_like(saved_group, own_group, index)
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


def exported(entries: Iterable[tuple[str, Any]], model: nn.Module) -> dict[str, Any]:
    """Copies of the entries of a model's state dict on the CPU, under their names in the unwrapped model."""
    wrappers = parallel_wrappers(model)
    return {
        unwrapped(name, wrappers): value.to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in entries
    }


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


def _ordered_like(saved_group: Group, own_group: Group, index: int) -> dict[str, Any]:
    """A saved group's keys and names of parameters, in our group's order; empty unless both have names.

    Raises:
        ValueError: The names differ.
    """
    if "param_names" not in saved_group or "param_names" not in own_group:
        return {}
    names = {"param_names": list(own_group["param_names"])}
    if any(isinstance(key, str) for key in saved_group["params"]):
        return names  # torch's checkpoint helpers use names as keys, and have already ordered them as ours

    saved_names, own_names = (
        [unwrapped(name) for name in group["param_names"]] for group in (saved_group, own_group)
    )
    if sorted(saved_names) != sorted(own_names):
        missing, foreign = sorted({*own_names} - {*saved_names}), sorted({*saved_names} - {*own_names})
        raise ValueError(
            f"param_groups[{index}] of the state dict has other parameters than the optimiser: of the "
            f"optimiser's it lacks {', '.join(missing[:3]) or 'none'}, and it has {', '.join(foreign[:3])}. "
            "Load it into the model it was saved with; if parameters have only been renamed, delete "
            '"param_names" from the groups of the state dict, and they are taken in their order.'
        )
    if len({*saved_names}) < len(saved_names):
        return names
    keys = dict(zip(saved_names, saved_group["params"], strict=True))
    return {"params": [keys[name] for name in own_names], **names}


class _SavedState(NamedTuple):
    """A state in a state dict, and the parameter that it belongs to."""

    location: Location
    group: Group  # of the state dict, completed
    state: Mapping[str, Tensor]


def _states_with_parameters(
    states: Mapping[Any, Mapping[str, Tensor]], groups: Sequence[Group], own: Sequence[Group]
) -> Iterator[_SavedState]:
    """The parameters' ``states``, which are given by the parameters' keys in ``groups``."""
    for location in locations(own):
        group = groups[location.group]
        if state := states.get(group["params"][location.in_group]):
            yield _SavedState(location, group, state)


def _check_has_state(
    saved_group: Group, states: Mapping[Any, Mapping[str, Tensor]], own_group: Group, index: int
) -> None:
    """Refuse a group that has made steps and has no states.

    Raises:
        ValueError: It is such a group.
    """
    trains = any(p.requires_grad for p in own_group["params"])
    if saved_group["k"] and trains and not any(states.get(key) for key in saved_group["params"]):
        raise ValueError(
            f"param_groups[{index}] of the state dict has made {saved_group['k']} steps, but none of its "
            "parameters has state. torch's set_optimizer_state_dict loses it where parameters have "
            "gradients: call optimizer.zero_grad() before."
        )


def _keep_base_(groups: Sequence[dict[str, Any]], saved: Iterable[_SavedState]) -> None:
    """Switch off ``bfloat16_z`` where states hold z itself, as earlier versions saved it."""
    for location, group, state in saved:
        if group["bfloat16_z"] and schedule_free.BASE in state and location.p.dtype == torch.float32:
            groups[location.group]["bfloat16_z"] = False
            warn_caller(
                f"param_groups[{location.group}] of the state dict has z, not its distance from the weights, "
                "which bfloat16_z=True keeps: it goes on with z as it is, and bfloat16_z=False."
            )


def _check_state(saved: _SavedState, name: str) -> None:
    """Refuse a state that its parameter could not have.

    Raises:
        ValueError: It is such a state.
    """
    p, state, o = saved.location.p, saved.state, Options.of(saved.group)
    shape = tuple(p.shape)
    # A model that is converted to bfloat16 while it is trained keeps z as the offset that it was.
    weight_dtype = torch.float32 if o.bfloat16_z and schedule_free.OFFSET in state else p.dtype
    subject = state_table.Subject(weight_dtype, p.dtype, p.device, shape, StateOptions.of(o))
    expected = state_table.entries_of(subject)
    freed = state_table.EVIDENCE_KEYS if o.is_frozen(saved.group) else ()
    if set(state).symmetric_difference(expected) - set(freed):
        raise ValueError(
            f"{name}: the state dict holds {sorted(state)}, this optimiser needs {sorted(expected)}: it was "
            "saved by another optimiser, or with other options."
            + (
                " The weights are in it as ScheduleFreeCallback (of the Lightning integration) saves them: "
                "resume with that callback in the trainer."
                if WEIGHTS in state
                else ""
            )
        )
    for key, value in state.items():
        needed = state_table.TABLE[key].saved_shape(shape, o.slice_p)
        found = tuple(value.shape) if isinstance(value, Tensor) else None
        if found != needed:
            raise ValueError(
                f"{name}: {key!r} of the state dict "
                + (f"is of {type(value)}" if found is None else f"has shape {found}")
                + f", but a parameter of shape {shape} needs {needed}: load it into the model it was saved "
                "with."
            )
        if value.dtype not in state_table.DTYPES:
            raise ValueError(
                f"{name}: {key!r} of the state dict is {value.dtype}, which cannot hold it: load the state "
                "dict in the dtypes it was saved in."
            )


class _StateToSave(NamedTuple):
    """A parameter whose state is to be saved."""

    saved_as: int  # its key in the state dict, from 0
    p: Tensor
    slice_p: int  # the distance between samples
    state: Mapping[str, Tensor]


def _states_to_save(
    groups: Sequence[Group], state: Mapping[Tensor, Mapping[str, Tensor]], placement: Placement
) -> Iterator[_StateToSave]:
    last = {location.p: location.ordinal for location in locations(groups)}  # of one given twice, the last
    for location in locations(groups):
        p, group = location.p, groups[location.group]
        if p in state and last[p] == location.ordinal:
            o, entries = Options.of(group), state[p]
            if entries and o.is_frozen(group):
                freed = state_table.freed_state(placement.local(p), placement.layout(p), StateOptions.of(o))
                entries = {**entries, **stored(placement, p, freed, o.slice_p)}
            yield _StateToSave(location.ordinal - 1, p, o.slice_p, entries)


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
    to_save = list(_states_to_save(groups, state, placement))
    asked: list[Asked] = []
    for _, p, slice_p, entries in to_save:
        layout = placement.layout(p)
        rows = {
            key: samples.spread(entries[key], layout, slice_p)
            for key in state_table.SAMPLED_KEYS
            if key in entries
        }
        asked.append({key: layout.sum(value, layout.dims[-1:]) for key, value in rows.items()})
    # Clones: when torch copies a state for an asynchronous save, it does not copy 0-dim DTensors, and fails
    # on views; rows that the exchange has completed are views into one buffer.
    return {
        saved_as: {
            **{key: value if value.ndim else value.clone() for key, value in entries.items()},
            **{key: placement.store(p, value.clone(), key, slice_p) for key, value in rows.items()},
        }
        for (saved_as, p, slice_p, entries), rows in zip(to_save, exchange.complete(asked)(), strict=True)
    }


@isolated
def loaded_state(saved: _SavedState, placement: Placement) -> dict[str, Tensor]:
    """A parameter's state as the optimiser keeps it, from its saved form: undoes :func:`saved_states`."""
    p, o = saved.location.p, Options.of(saved.group)
    slice_p, frozen = o.slice_p, o.is_frozen(saved.group)
    needed = {
        key: value for key, value in saved.state.items() if not (frozen and key in state_table.EVIDENCE_KEYS)
    }
    pieces = {key: placement.load(p, value, key, slice_p) for key, value in needed.items()}
    if "p0" in pieces:  # earlier versions kept it in bfloat16
        pieces["p0"] = pieces["p0"].to(torch.promote_types(pieces["p0"].dtype, p.dtype))
    return {
        key: samples.collect(piece, placement.layout(p), slice_p)
        if key in state_table.SAMPLED_KEYS
        else placement.store(p, piece, key, slice_p)
        for key, piece in pieces.items()
    }


def checked_parts(
    state_dict: Group, own: Sequence[Group], placement: Placement
) -> tuple[list[dict[str, Any]], dict[Any, Any], dict[Tensor, dict[str, Tensor]]]:
    """Check a state dict, and split it into the parts that the optimiser loads.

    Args:
        state_dict, own: As for :func:`checked_groups`.
        placement: Where the tensors lie.

    Returns:
        The groups; the entries of ``state`` that belong to no parameter; and the parameters' states as they
        are kept.

    Raises:
        ValueError: The state dict does not fit this optimiser.
    """
    groups, states = checked_groups(state_dict, own), state_dict["state"]
    for index, (saved_group, own_group) in enumerate(zip(groups, own, strict=True)):
        _check_has_state(saved_group, states, own_group, index)
    saved = list(_states_with_parameters(states, groups, own))
    _keep_base_(groups, saved)
    for state in saved:
        _check_state(state, state.location.name_in(own))
    keys = {key for group in groups for key in group["params"]}
    others = {key: value for key, value in states.items() if key not in keys}
    return groups, others, {state.location.p: loaded_state(state, placement) for state in saved}
