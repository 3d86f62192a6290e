"""Recording every operator that a step calls, with its arguments and its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result is a value, or a shape, that the host must wait for.
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "is_nonzero")


class Call(NamedTuple):
    """A call of an operator; its tensors are the originals, not copies."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        return str(self.func.overloadpacket.__name__)

    @property
    def is_collective(self) -> bool:
        return bool(self.func.namespace == "c10d")

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, also within lists."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every call made within its context, in order, as ``calls``.

    Args:
        reads: Whether the host may read values; if not, an operator that does raises AssertionError.
        note: What to keep instead of the call itself, so that no tensor outlives its use.
        through: Classes of tensors whose own operators are not recorded, but those that they run are.
    """

    def __init__(
        self,
        *,
        reads: bool = True,
        note: Callable[[Call], Any] = lambda call: call,
        through: tuple[type, ...] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads, self.note, self.through = reads, note, through
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, self.through) for kind in types):
            return NotImplemented
        assert self.reads or func.overloadpacket.__name__ not in READS, f"{func} waits for the device"
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append(self.note(Call(func, args, kwargs, result)))
        return result
