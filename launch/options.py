"""Parsing of command lines whose errors are printed once, not by every process."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

LARGEST = 2**63 - 1  # the largest size, and the largest seed, that torch and numpy both take
YEAR = 365 * 24 * 60 * 60  # in seconds; gloo counts nanoseconds, which overflow after some 300 years


class Parser(argparse.ArgumentParser):
    """Raises errors instead of exiting, so that :meth:`ranks.Ranks.fail_together` can print them."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse.

        Raises:
            ValueError: Always.
        """
        raise ValueError(message)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1, LARGEST)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0, LARGEST)


def seconds(text: str) -> timedelta:
    """A time in whole seconds, of at most a year."""
    return timedelta(seconds=_whole(text, 1, YEAR))


def duration(text: str) -> float:
    """A finite time greater than 0."""
    return _real(text, "a finite number greater than 0", lambda value: 0 < value < math.inf)


def rate(text: str) -> float:
    """A learning rate."""
    # Larger rates could overflow float32 in the optimiser's products.
    return _real(text, "a number in [0, 1e30]", lambda value: 0 <= value <= 1e30)


def probability(text: str) -> float:
    """A probability less than 1."""
    return _real(text, "a number in [0, 1)", lambda value: 0 <= value < 1)


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return value


def _real(text: str, allowed: str, test: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan  # which no test lets through
    if not test(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return value
