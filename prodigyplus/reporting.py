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


def is_called_from(module: str) -> bool:
    """Whether a function of the module of this name is on the call stack."""
    frame = sys._getframe(1)
    while frame.f_back:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == module:
            return True
    return False
