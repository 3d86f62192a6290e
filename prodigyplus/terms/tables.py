"""Small tables that the host fills and a device reads: sent when they have changed, without blocking."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prodigyplus.terms.isolation import is_captured


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
