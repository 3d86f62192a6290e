"""Command lines whose errors are told once, not by every process."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import NoReturn


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
    return _from(1, text)


def natural(text: str) -> int:
    """A number from 0."""
    return _from(0, text)


def seconds(text: str) -> timedelta:
    """A time of at least a second."""
    return timedelta(seconds=positive(text))


def _from(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is less than {least}")
    return number
