"""Command lines whose errors are told once, not by every process."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

LARGEST = 2**63 - 1  # the largest size, and the largest seed, that torch and numpy both take
YEAR = 365 * 24 * 60 * 60  # of seconds; gloo counts nanoseconds, of which 300 years are too many


class Parser(argparse.ArgumentParser):
    """Raises what is wrong with a command line, for :meth:`ranks.Ranks.together` to tell."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse.

        Raises:
            ValueError: Always.
        """
        raise ValueError(message)


def positive(text: str) -> int:
    """A number from 1."""
    return _whole(text, 1, LARGEST)


def natural(text: str) -> int:
    """A number from 0."""
    return _whole(text, 0, LARGEST)


def seconds(text: str) -> timedelta:
    """A time of at least a second and at most a year."""
    return timedelta(seconds=_whole(text, 1, YEAR))


def duration(text: str) -> float:
    """A finite time that is not over at once."""
    return _real(text, "a finite number greater than 0", lambda number: 0 < number < math.inf)


def rate(text: str) -> float:
    """A learning rate."""
    # Above, an optimiser's multiples of it would be too large for float32.
    return _real(text, "a number in [0, 1e30]", lambda number: 0 <= number <= 1e30)


def probability(text: str) -> float:
    """That of something that does not always happen."""
    return _real(text, "a number in [0, 1)", lambda number: 0 <= number < 1)


def _whole(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return number


def _real(text: str, allowed: str, test: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan  # which no test lets through
    if not test(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return number
