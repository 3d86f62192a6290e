"""One step of a bundle of parameters, from their gradients to their new weights, as a generator.

``update`` is the only place that states the order of a step: passes over memory (see
:mod:`prodigyplus.engine.passes`), and between them requests for what they need to know about whole tensors.
It knows nothing of processes: it yields sums over local pieces, and is sent the sums over whole tensors.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from prodigyplus.engine.bundle import Bundle
from prodigyplus.terms.requests import Answers, Requests, Sum
from prodigyplus.terms.step_numbers import StepNumbers

Rule = Generator[Requests, Answers, None]


def update(bundle: Bundle) -> Rule:
    """One step of a bundle.

    Args:
        bundle: Its weights and states are changed in place.

    Yields:
        Requests; the caller must send the answers.
    """
    # The sums of the raw gradients' squares decide whether the step happens at all.
    squares = yield {**bundle.squares(), **_presence(bundle)}
    backend = bundle.backend(squares, _numbers(bundle, squares))

    if backend.kind.has_momentum:
        yield from backend.scale_up_(backend.momentum_())
    answers = yield from _asked(backend.measure_())
    takes_evidence, is_late = backend.kind.evidence is not None, backend.kind.is_late
    evidence = backend.evidence_(answers) if takes_evidence and not is_late else None
    if (agreeing := backend.move_(answers)) is not None:
        yield from backend.scale_up_(agreeing)
    if is_late:
        answers |= yield from _asked(backend.late_sums())
        evidence = backend.evidence_(answers)
    if evidence is not None:
        bundle.group.observe(bundle.ordinals, *evidence)
    backend.finish_()


def _asked(requests: Requests) -> Generator[Requests, Answers, Answers]:
    """Yield requests, if there are any, and return the answers."""
    return (yield requests) if requests else {}


def _presence(bundle: Bundle) -> Requests:
    """If ranks may lack gradients, a request for how many ranks have each; shape (count,)."""
    if bundle.present is None:
        return {}
    present = torch.ones(len(bundle.present), dtype=bundle.dtype, device=bundle.weights[0].device)
    if not all(bundle.present):
        present = torch.stack([torch.full_like(present[0], here) for here in bundle.present])
    return {"present": Sum(present, bundle.axes)}


def _numbers(bundle: Bundle, squares: Answers) -> StepNumbers:
    """The numbers of the step, those of a no-op for parameters that are skipped individually."""
    n = bundle.group.step_numbers(bundle.weights[0].device, bundle.dtype)
    if bundle.group.skips_per_param:
        n = n.where(squares["total"].isfinite())
    if bundle.present is not None and not all(bundle.present):
        n = n.where(squares["present"] > 0)
    return n
