"""Files that appear whole or not at all, and folders that one run has to itself."""

from __future__ import annotations

import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

LOCK = ".lock"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to in the body; what was written there then takes the place of ``path``.

    If the body raises, ``path`` stays as it was.

    Raises:
        OSError: It cannot be written; told by its name.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            yield draft
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def writing(name: Path | str) -> Iterator[None]:
    """Tell what cannot be written: a full disk does not say.

    Raises:
        OSError: What the body raises, in other words.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{name} cannot be written: {error.strerror or error}") from error


def lock(folder: Path, patience: timedelta) -> None:
    """Keep other runs out of a folder, which is made if need be, for as long as this process lives.

    The kernel lets go when the process ends, however it ends. Where the file system has no locks,
    a warning says so.

    Args:
        folder: The ``--out`` of the run.
        patience: How long to wait for another to let go.

    Raises:
        OSError: The folder cannot be written to.
        ValueError: Another run has it.
    """
    with writing(f"--out: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    end = time.monotonic() + patience.total_seconds()
    while not _take(descriptor, folder):
        if time.monotonic() >= end:
            os.close(descriptor)
            raise ValueError(
                f"--out: another run is writing to {folder}: wait for its end, or choose another --out."
            )
        time.sleep(1)


def _take(descriptor: int, folder: Path) -> bool:
    """Lock a file, as far as files can be locked in its folder; returns whether nobody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): see to it that no other run writes to it.",
            stacklevel=3,
        )
    return True
