"""Switch a model between training weights y and their average x, for good or within a context; copy x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prodigyplus.formulas import schedule_free
from prodigyplus.terms.isolation import isolated
from prodigyplus.view import View

State = Mapping[str, Tensor]


class AverageSwap:
    """Swaps y and x in a model, and keeps what it takes to swap back."""

    def __init__(self) -> None:
        self.is_lent = False  # whether the model holds x within a context of :meth:`lent`
        # In eval mode: y of each parameter whose x was projected, since y cannot be recomputed from such an
        # x; and x. If the model holds another by then, someone has loaded weights, to which this y does not
        # belong.
        self._saved: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def forget(self) -> None:
        """Drop what is saved, since the weights in the model have been replaced."""
        self._saved.clear()

    @isolated
    def swap_(self, view: View, *, train: bool) -> None:
        """Put y (``train``) or x into the model, in the groups that are in the other mode."""
        groups = view.in_other_mode(train=train)
        # A projection is the user's code and may raise: all are made before any weight moves.
        projected = {} if train else self._projected(view, groups)
        for group in groups:
            # With the β1 that x was computed with, since a schedule may have changed it.
            beta1 = group["average_beta1"] if train else None
            beta1 = group["betas"][0] if beta1 is None else beta1
            for p, state in view.averaged(group):
                local = view.placement.local(p)
                if train:
                    self._put_y_(p, local, state, beta1)
                elif p in projected:
                    y, x = p.detach().clone(), projected.pop(p)
                    p.copy_(x)
                    self._saved[p] = view.placement.local(y), view.placement.local(x)
                else:
                    schedule_free.x_from_y(local, state, beta1, out=local)
            group["train_mode"], group["average_beta1"] = train, None if train else beta1

    @staticmethod
    def _projected(view: View, groups: Sequence[dict[str, Any]]) -> dict[Tensor, Tensor]:
        """The averages of the constrained parameters of groups."""
        return {
            p: _average(view, group, p, state)
            for group in groups
            for p, state in view.averaged(group)
            if view.constraints.of(p)
        }

    def _put_y_(self, p: Tensor, local: Tensor, state: State, beta1: float) -> None:
        if p not in self._saved:
            schedule_free.y_from_x(local, state, beta1, out=local)
            return
        y, x = self._saved.pop(p)
        holds_x = (local == x).all()
        schedule_free.y_from_x(local, state, beta1, out=local)
        local.copy_(torch.where(holds_x, y, local))

    def averages(self, view: View) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (parameter, x) for each parameter that does not hold x now; x is new, laid out like it."""
        for group in view.groups:
            if group["use_schedulefree"] and group["train_mode"] and not self.is_lent:
                for p, state in view.averaged(group):
                    yield p, _average(view, group, p, state)

    @contextmanager
    def lent(self, view: View, has_changed: Callable[[], object]) -> Iterator[None]:
        """A context in which the model holds x; on leaving it, every weight is restored to the bit.

        Args:
            view: The optimiser.
            has_changed: Called after the weights in the model have been replaced.
        """
        before: list[tuple[Tensor, Tensor]] = []
        try:
            self._lend_(view, before)
            has_changed()
            yield
        finally:
            self.is_lent = False
            _restore_(before)
            has_changed()

    @isolated
    def _lend_(self, view: View, before: list[tuple[Tensor, Tensor]]) -> None:
        for p, x in self.averages(view):
            before.append((p, p.detach().clone()))
            p.copy_(x)
        self.is_lent = True

    @isolated
    def state_dict_of(
        self, view: View, model: nn.Module, has_changed: Callable[[], object]
    ) -> dict[str, Any]:
        """``model.state_dict()`` with x in place of y; further entries of a tied weight are clones.

        Args:
            view: The optimiser.
            model: A model with parameters of it.
            has_changed: See :meth:`lent`.
        """
        # By id(): with keep_vars the entries are the parameters themselves, and tensors compare by value.
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        averages = {id(p): x for p, x in self.averages(view)}
        has_average = {id(p) for g in view.groups if g["use_schedulefree"] for p, _ in view.averaged(g)}
        entries: dict[str, Any] = {}
        seen: set[int] = set()
        made: list[str] = []
        for name, value in model.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                entries[name] = value
                continue
            key = id(value)
            entry = averages.get(key, value.detach())
            # The model's own tensors will hold y again: an entry that holds x now must be a copy.
            holds_x = key not in averages and (key in has_average or key not in own)
            entries[name] = entry.clone() if holds_x or key in seen else entry
            seen.add(key)
            if key not in own:
                made.append(name)
        # A hook has made them, maybe of parameters, as one that takes a fused matrix apart.
        if made and averages:
            with self.lent(view, has_changed):
                at_x = model.state_dict()
                entries |= {name: at_x[name].detach().clone() for name in made}
        return entries


def _average(view: View, group: Mapping[str, Any], p: Tensor, state: State) -> Tensor:
    """The average x of a parameter that holds y, projected where it is constrained; a new tensor."""
    x, local = torch.empty_like(p, requires_grad=False), view.placement.local
    schedule_free.x_from_y(local(p), state, group["betas"][0], out=local(x))
    for constraint in view.constraints.of(p):
        x = constraint.projected(x, view.placement)
    return x


@isolated
def _restore_(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    # The last first: of two parameters that share memory, the second was copied when that held the first's x.
    for p, y in reversed(before):
        p.copy_(y)


@isolated
def check_model(view: View, model: nn.Module) -> None:
    """Check that the optimiser has parameters of this model.

    Raises:
        ValueError: It has parameters, but none of the model's.
    """
    # After a forward pass without a backward pass, they may still be in the place of the model's parameters.
    view.placement.free_gathered(view.parameters)
    parameters = set(view.parameters)
    if parameters and parameters.isdisjoint(model.parameters()):
        raise ValueError(
            "averaged_state_dict: none of the model's parameters is one of the optimiser's, which has "
            "the average of no other: pass the model whose parameters it was given, not a copy of it."
        )
