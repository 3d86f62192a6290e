"""Where the tensors of the sharded optimiser lie: DTensors in pieces on a mesh, others on every rank."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from prodigyplus.placement import Location, WholeTensors
from prodigyplus.state_table import TABLE
from prodigyplus_dist.layout import MeshLayout, layout_of, placements_of
from prodigyplus_dist.torch_private import local_tensors, reshard_modules_of


class MeshTensors:
    """Parameters of any mesh and placement but ``Partial``; see :class:`prodigyplus.placement.Placement`.

    Args:
        replicas: The ranks that hold copies of plain tensors, or None.
    """

    def __init__(self, replicas: dist.ProcessGroup | None) -> None:
        self.replicas = replicas
        self._whole = WholeTensors()
        self._layouts: dict[Hashable, MeshLayout] = {}  # cached, as in WholeTensors
        self._trained: Set[Tensor] = frozenset()  # the parameters that required gradients at the last step

    def __deepcopy__(self, memo: dict[int, object]) -> MeshTensors:
        return MeshTensors(self.replicas)  # the copy of an optimiser talks to the same ranks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": {}, "_trained": frozenset()}

    def local(self, tensor: Tensor) -> Tensor:
        return local_tensors([tensor])[0]

    def locals(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return local_tensors(tensors)

    def layout(self, p: Tensor) -> MeshLayout:
        key = (p.shape, p.device_mesh, p.placements) if isinstance(p, DTensor) else p.shape
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = layout_of(p, self.replicas)
        return layout

    def store(self, p: Tensor, local: Tensor, key: str, slice_p: int) -> Tensor:
        if not isinstance(p, DTensor):
            return local
        shape = TABLE[key].saved_shape(tuple(p.shape), slice_p)
        return DTensor.from_local(
            local,
            p.device_mesh,
            placements_of(p, TABLE[key].whole_dims(tuple(p.shape))),
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )

    def load(self, p: Tensor, saved: Tensor, key: str, slice_p: int) -> Tensor:
        if not isinstance(p, DTensor):
            return self._whole.load(p, saved, key, slice_p)
        device, whole = self.local(p).device, TABLE[key].whole_dims(tuple(p.shape))
        if isinstance(saved, DTensor) and saved.device_mesh != p.device_mesh:
            saved = saved.full_tensor()
        if isinstance(saved, DTensor):
            return saved.redistribute(p.device_mesh, placements_of(p, whole)).to_local().to(device, copy=True)
        for dim, indices in enumerate(self.layout(p).indices):
            if dim not in whole:
                chosen = torch.tensor(indices, dtype=torch.int64, device="cpu").to(saved.device)
                saved = saved.index_select(dim, chosen)
        return saved.to(device, copy=True)

    def place_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        if isinstance(like, DTensor) and isinstance(tensor, DTensor) and tensor.placements != like.placements:
            return tensor.redistribute(like.device_mesh, like.placements)
        return tensor

    def takes_part(self, p: Tensor) -> bool:
        # Another rank may have a gradient where this one has none, so this rank cannot decide by its own
        # gradient. A parameter frozen since the last step may still have a gradient on some rank, and takes
        # part once more.
        return p.requires_grad or p.grad is not None or p in self._trained

    def remember_trained(self, parameters: Iterable[Tensor]) -> None:
        self._trained = {p for p in parameters if p.requires_grad}

    def local_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: self.local(value) for key, value in state.items()}

    def gradient(
        self, location: Location, grad: Tensor | None, name: Callable[[Location], str]
    ) -> tuple[Tensor, bool | None]:
        p = location.p
        if grad is None:
            return torch.zeros_like(p), False
        if isinstance(p, DTensor) and not _lies_with(p, grad):
            if not isinstance(grad, DTensor) or grad.device_mesh != p.device_mesh:
                found = f"on {grad.device_mesh}" if isinstance(grad, DTensor) else "a plain tensor"
                raise RuntimeError(
                    f"{name(location)} is on {p.device_mesh}, but its gradient is {found}: give it "
                    "one on the parameter's mesh."
                )
            # Autograd returns a gradient in the placements of its last operator: under SequenceParallel, that
            # of a norm is still Partial. All ranks redistribute it, in the same order.
            grad = grad.redistribute(p.device_mesh, p.placements)
        return grad, True

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        grads = [p.grad for p in parameters]
        return local_tensors(grads) if all(map(_lies_with, parameters, grads)) else None  # type: ignore[arg-type]

    def check(self, p: Tensor, name: str) -> None:
        if not isinstance(p, DTensor):
            self._whole.check(p, name)
        elif any(placement.is_partial() for placement in p.placements):
            raise RuntimeError(
                f"{name} has placements {p.placements}: a Partial parameter has no value to train."
            )

    def free_gathered(self, parameters: Iterable[Tensor]) -> None:
        # FSDP2 keeps the weights of a root module gathered after a forward pass, until a backward pass.
        reshard_modules_of(parameters)


def _lies_with(p: Tensor, grad: Tensor | None) -> bool:
    """Whether a parameter has a gradient here, on the same mesh with the same placements."""
    if isinstance(grad, DTensor) and isinstance(p, DTensor):
        return grad.placements == p.placements and grad.device_mesh == p.device_mesh
    return type(grad) is Tensor and not isinstance(p, DTensor)
