"""One step of parameters that move as one, from their gradients to their new weights, as a generator.

``update`` is the only place that states the order of a step: passes over memory (see
:mod:`prodigyplus.engine.passes`), and between them requests for what they need to know about whole tensors.
It knows nothing of processes: it yields sums over local pieces, and is sent the sums over whole tensors.

What moves is a ``Stack`` (:mod:`prodigyplus.engine.stack`), by operators or through ``torch.compile``, or a
``Batch`` (:mod:`prodigyplus.engine.batches`), by kernels. The rule knows both by two protocols.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prodigyplus.engine.group_step import GroupStep
from prodigyplus.engine.kind import Kind
from prodigyplus.terms.layout import Layout
from prodigyplus.terms.requests import Answers, Requests, Sum
from prodigyplus.terms.scalars import Constants, Scalars

Rule = Generator[Requests, Answers, None]


def update(moving: Moving, constants: Constants) -> Rule:
    """One step of a moving.

    Args:
        moving: What moves; its weights and states are changed in place.
        constants: The optimiser's.

    Yields:
        Requests; the caller must send the answers.
    """
    # The sums of the raw gradients' squares decide whether the step happens at all.
    squares = yield {**moving.squares(constants), **_presence(moving)}
    work = moving.work(squares, _numbers(moving, squares), constants)

    if work.kind.has_momentum:
        yield from work.scale_up_(work.momentum_())
    answers = yield from _asked(work.measure_())
    takes_evidence, is_late = work.kind.evidence is not None, work.kind.is_late
    evidence = work.evidence_(answers) if takes_evidence and not is_late else None
    if (agreeing := work.move_(answers)) is not None:
        yield from work.scale_up_(agreeing)
    if is_late:
        answers |= yield from _asked(work.late_sums())
        evidence = work.evidence_(answers)
    if evidence is not None:
        moving.group.observe(moving.ordinals, *evidence)
    work.finish_()


def _asked(requests: Requests) -> Generator[Requests, Answers, Answers]:
    """Yield requests, if there are any, and return the answers."""
    return (yield requests) if requests else {}


def _presence(moving: Moving) -> Requests:
    """If ranks may lack gradients, a request for how many ranks have each; shape (count,)."""
    if moving.present is None:
        return {}
    present = torch.ones(len(moving.present), dtype=moving.dtype, device=moving.weights[0].device)
    if not all(moving.present):
        present = torch.stack([torch.full_like(present[0], here) for here in moving.present])
    return {"present": Sum(present, moving.axes)}


def _numbers(moving: Moving, squares: Answers) -> Scalars:
    """The numbers of the step, those of a no-op for parameters that are skipped individually."""
    n = moving.group.scalars(moving.weights[0].device, moving.dtype)
    if moving.group.skips_per_param:
        n = n.where(squares["total"].isfinite())
    if moving.present is not None and not all(moving.present):
        n = n.where(squares["present"] > 0)
    return n


class Moving(Protocol):
    """Parameters of one group that move as one: a :class:`Stack`, or a ``Batch`` of ``engine/batches.py``."""

    weights: list[Tensor]
    group: GroupStep
    ordinals: list[int]
    present: list[bool] | None  # for each, as ``ParamStep.present``; None if nobody needs to ask
    nbytes: int  # bytes of directions that are alive while sums are completed
    is_matrix: bool

    def squares(self, constants: Constants) -> Requests:
        """Requests for sums of the raw gradients' squares; among them ``total``, one for each parameter."""
        ...

    def work(self, squares: Answers, n: Scalars, constants: Constants) -> Work:
        """The backend that runs the passes.

        Args:
            squares: The sums of the gradients' squares, completed.
            n: The numbers of the step.
            constants: The optimiser's.
        """
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def layouts(self) -> Sequence[Layout]:
        """The layouts of the tensors whose matrices are asked for, in that order."""
        ...

    @property
    def cost(self) -> tuple[int, int, int]:
        """The cost of orthogonalising the largest matrix, and its rows and columns: a sort key."""
        ...

    @property
    def axes(self) -> tuple[Hashable, ...]: ...

    @property
    def is_sharded(self) -> bool: ...


class Work(Protocol):
    """A backend: runs the passes of one stack, and keeps what one pass needs from another."""

    kind: Kind
    n: Scalars

    def momentum_(self) -> Tensor | None:
        """Update the first moment; if Cautious masks it, return how many elements agree, else None."""
        ...

    def scale_up_(self, agreeing: Tensor | None) -> Generator[Requests, Answers, None]:
        """Divide Cautious's result by the fraction of the whole tensor's elements that agree."""
        ...

    def measure_(self) -> Requests:
        """Update the second moment and Prodigy's s; return requests for what the move needs."""
        ...

    def move_(self, answers: Answers) -> Tensor | None:
        """Move y and z; or, if the move is masked, propose it, and return as :meth:`momentum_`."""
        ...

    def late_sums(self) -> Requests:
        """Requests for evidence of directions that came after :meth:`measure_`; see ``Kind.is_late``."""
        ...

    def evidence_(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Each parameter's evidence for the step size, from sums over whole tensors; shapes (count,)."""
        ...

    def finish_(self) -> None:
        """Make a move that was proposed, and write copies back to their tensors."""
        ...
