"""Warnings that point at the line of the caller's own code."""

from __future__ import annotations

import sys
import warnings

_LIBRARIES = ("prodigyplus.", "prodigyplus_", "torch.")


def warn_caller(message: str) -> None:
    """Warn at the innermost line outside this library and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class Warner:
    """Warns of each thing once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def warn(self, message: str, what: str | None = None) -> None:
        """Warn, unless it has warned of the same already.

        Args:
            message: The warning.
            what: What it is of, if messages of the same may differ. None: the message itself.
        """
        key = what or message
        if key not in self._told:
            self._told.add(key)
            warn_caller(message)


def is_called_from(module: str) -> bool:
    """Whether a function of the module of this name is on the call stack."""
    frame = sys._getframe(1)
    while frame.f_back:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == module:
            return True
    return False
