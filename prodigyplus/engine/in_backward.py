"""Hooks that move parameters within the backward pass, as soon as their gradients are complete.

If gradients are summed over processes only after these hooks have run, other hooks are needed: see
``prodigyplus_dist``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Take = Callable[[Tensor, Tensor], bool]
"""Takes a parameter and its gradient, and moves it now or soon; returns whether to free the gradient."""


class Hooks(Protocol):
    """Where gradients are consumed within backward passes; see :class:`ParameterHooks`."""

    def attach(self, model: nn.Module, parameters: Mapping[str, Tensor], take: Take) -> list[RemovableHandle]:
        """Make backward passes of ``model`` pass the gradients of ``parameters`` to ``take``.

        Raises:
            ValueError: Gradients are not complete when the hooks run.
        """
        ...

    def finish(self) -> None:
        """Take the gradients that are still waiting after a backward pass."""
        ...


class ParameterHooks:
    """The hooks of one process: a parameter's own, which run once its gradient is complete."""

    def attach(self, model: nn.Module, parameters: Mapping[str, Tensor], take: Take) -> list[RemovableHandle]:
        # DDP sums gradients over processes after the hook; WORLD_SIZE shows it before the model is wrapped.
        wrapped = any(hasattr(module, "register_comm_hook") for module in model.modules())
        processes = os.environ.get("WORLD_SIZE", "1")
        if wrapped or processes != "1":
            raise ValueError(
                "fuse_backward: gradients are summed over processes"
                + (" (DistributedDataParallel)" if wrapped else f" (WORLD_SIZE={processes})")
                + ", which a hook of a parameter does not see: use ShardedProdigyPlusScheduleFree (from "
                "prodigyplus_dist), which waits for it."
            )
        return hook_parameters(parameters, take)

    def finish(self) -> None:
        pass


def hook_parameters(parameters: Mapping[str, Tensor], take: Take) -> list[RemovableHandle]:
    """Hook each parameter, to pass its gradient to ``take``, and free it if ``take`` returns True."""

    def consume(p: Tensor) -> None:
        if p.grad is not None and take(p, p.grad):
            p.grad = None

    return [
        p.register_post_accumulate_grad_hook(consume)  # type: ignore[no-untyped-call]
        for p in parameters.values()
    ]


def fusable(model: nn.Module, groups: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The parameters of a model that are moved within backward passes, by name: those that are not frozen.

    Raises:
        ValueError: There are none.
    """
    ours = {p for group in groups if group["fused_back_pass"] for p in group["params"]}
    # torch hooks no others. One that is unfrozen later is moved by step().
    parameters: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p in ours and p.requires_grad
    }
    if not parameters:
        raise ValueError(
            "fuse_backward: no parameter of the model that requires gradients is in a group with "
            "fused_back_pass=True. Pass fused_back_pass=True to the optimiser, and the model whose "
            "parameters it was given; unfreeze first what is to be trained."
        )
    return parameters
