"""What a step calls: every operator, with what it was given and what it gave."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result is a value, or a shape, that the host has to wait for.
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "is_nonzero")


class Call(NamedTuple):
    """A call of an operator; the tensors are themselves, not copies."""

    func: Any
    args: tuple
    kwargs: dict
    result: Any

    @property
    def name(self) -> str:
        return self.func.overloadpacket.__name__

    @property
    def is_collective(self) -> bool:
        return self.func.namespace == "c10d"

    @property
    def tensors(self) -> list[Tensor]:
        """The arguments that are tensors, or within lists."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


class Watch(TorchDispatchMode):
    """Keeps every call that is made under it, in their order, as ``calls``.

    Args:
        reads: Whether the host may read values; if not, an operator that does is an AssertionError.
    """

    def __init__(self, *, reads: bool = True):
        super().__init__()
        self.reads, self.calls = reads, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert self.reads or func.overloadpacket.__name__ not in READS, f"{func} waits for the device"
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append(Call(func, args, kwargs, result))
        return result
