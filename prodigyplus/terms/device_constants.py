"""What the host makes and a device reads: constants that are kept, and tables that are sent when they change.

Nothing waits for a copy. What a CUDA graph has captured is kept, since every replay reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from prodigyplus.terms.isolation import is_captured

T = TypeVar("T")

# How many constants an optimiser keeps at most.
_MAX_CONSTANTS = 1 << 14

# After how many steps that made their batches anew and did not use it, a constant of get_recent() is dropped.
_RECENT = 4


def int64_on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """``numbers`` as an int64 tensor on a device."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


class Constants:
    """A cache of what is mostly the same at every step, such as integers on a device, and tables of them.

    Each optimiser has its own: its tensors may be fake ones, which are of no use to another.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._age = 0
        self._used: dict[Hashable, int] = {}  # what is recent, and at which age it was last used
        self._in_graphs: list[tuple[object, dict[Hashable, Any]]] = []

    def get(self, device: torch.device, key: Hashable, make: Callable[[], T]) -> T:
        """The result of ``make()``, which is called once for each device and key, and then cached.

        Raises:
            RuntimeError: A CUDA graph is being captured and the result is not cached yet: it would exist only
                when the graph is replayed.
        """
        key = device, key
        if key not in self._made:
            if is_captured(device):
                raise RuntimeError(
                    "a step is captured in a CUDA graph that differs from those before: before the capture, "
                    "make at least one step with the same options and with gradients of the same parameters."
                )
            if len(self._made) >= _MAX_CONSTANTS:
                self._made.clear()
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def get_recent(self, device: torch.device, key: Hashable, make: Callable[[], T]) -> T:
        """As :meth:`get`, for what is large, or another whenever other parameters have gradients.

        It is forgotten some calls of :meth:`forget_unused_` after its use.
        """
        self._used[device, key] = self._age
        return self.get(device, key, make)

    def forget_unused_(self) -> None:
        """Forget what was not used recently; see :meth:`get_recent`."""
        self._age += 1
        for key in [key for key, used in self._used.items() if used + _RECENT < self._age]:
            del self._used[key]
            self._made.pop(key, None)

    def int64(self, device: torch.device, numbers: Sequence[int]) -> Tensor:
        """:func:`int64_on`, cached."""
        return self.get(device, tuple(numbers), lambda: int64_on(device, numbers))

    def keep_for_graph(self, read: object) -> None:
        """Keep from being freed what a graph that is captured now reads: ``read``, and all that is cached."""
        self._in_graphs.append((read, dict(self._made)))


def sent(table: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A table on the host, as it is sent, and its copy on a device; the host does not wait for the copy."""
    # From pinned memory, which is not reused before it has been read.
    on_host = table.pin_memory() if device.type == "cuda" else table
    return on_host, on_host.to(device, non_blocking=True)


class SentTable:
    """The copy on a device of a table that the host makes.

    Args:
        device: The device that reads the table.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._key: object = None
        self._on_host: Tensor
        self._table: Tensor
        self._in_graphs: list[tuple[Tensor, Tensor]] = []

    def of(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """The table on the device; ``make()`` makes it on the host, and is called if ``key`` has changed."""
        captured = is_captured(self._device)
        if self._key is None or key != self._key:
            self._on_host, self._table = sent(make(), self._device)
            # A copy that is captured runs only when the graph is replayed, so the next call must send again.
            self._key = None if captured else key
        if captured:
            self._in_graphs.append((self._on_host, self._table))  # read at every replay
        return self._table
