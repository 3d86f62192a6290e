"""What moves as one: parameters of a group that share their passes over memory.

A bundle is a ``Stack`` (:mod:`prodigyplus.engine.stack`), which moves by operators or through
``torch.compile``, or a ``Batch`` (:mod:`prodigyplus.engine.batches`), which moves by kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Hashable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prodigyplus.engine.kind import Kind
from prodigyplus.engine.param_step import ParamStep, cost_of
from prodigyplus.terms.dtypes import compute_dtype
from prodigyplus.terms.requests import Answers, Requests
from prodigyplus.terms.step_numbers import StepNumbers


class Bundle(ABC):
    """Parameters of one group, and what a step needs of them; the attributes are those of their ParamSteps.

    Attributes:
        kind: Which operators the passes consist of.
        nbytes: How many bytes of directions are alive while sums are completed.
    """

    nbytes: int

    def __init__(self, params: Sequence[ParamStep]) -> None:
        first = params[0]
        self.weights = [param.weight for param in params]
        self.grads = [param.grad for param in params]
        self.layouts = [param.layout for param in params]
        self.group = first.group
        self.ordinals = [param.ordinal for param in params]
        # Whether this rank has each gradient; None if nobody needs to ask.
        self.present = None if first.present is None else [bool(param.present) for param in params]
        numel = first.layout.numel
        self.kind = Kind.of(first.group.options, first.state, numel, adapts=first.group.adapts)

    @abstractmethod
    def squares(self) -> Requests:
        """Requests for sums of the raw gradients' squares; among them ``total``, one for each parameter."""

    @abstractmethod
    def backend(self, squares: Answers, n: StepNumbers) -> Backend:
        """The backend that runs the passes.

        Args:
            squares: The sums of the gradients' squares, completed.
            n: The numbers of the step.
        """

    def whole_sums(self, sums: Mapping[str, Tensor]) -> Requests:
        """Requests to complete local sums, each of shape (count,), over whole tensors."""
        layout = self.layouts[0]  # the mesh axes are those of all
        return {name: layout.sum(value, layout.dims) for name, value in sums.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return compute_dtype(self.weights[0])

    @property
    def is_matrix(self) -> bool:
        """Whether Muon moves it, whose direction needs whole matrices."""
        return self.group.options.use_muon_pp

    @property
    def cost(self) -> tuple[int, int, int]:
        """The cost of orthogonalising the largest matrix, and its rows and columns: a sort key."""
        return cost_of(self.layouts[0], self.group)

    @property
    def axes(self) -> tuple[Hashable, ...]:
        """The mesh axes along which ranks hold shards or replicas of its parameters: the same for all."""
        layout = self.layouts[0]
        return layout.axes(layout.dims, count_replicas=True)

    @property
    def is_sharded(self) -> bool:
        """Whether its sums must be completed over other ranks before it moves."""
        return bool(self.layouts[0].shard_axes)


class Backend(Protocol):
    """A backend: runs the passes of one bundle, and keeps what one pass needs from another."""

    kind: Kind
    n: StepNumbers

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
