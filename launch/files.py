"""Atomic replacement of files, and locks on folders."""

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
    """Yield a draft path to write to, which replaces ``path`` at the end of the block.

    If the block raises, ``path`` is unchanged.

    Raises:
        OSError: The file cannot be written; the message names it.
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
    """Name the file in an OSError of the block: the error of a full disk does not.

    Raises:
        OSError: The block raised one.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{name} cannot be written: {error.strerror or error}") from error


def lock(folder: Path, patience: timedelta) -> None:
    """Lock a folder for as long as this process lives; it is created if it does not exist.

    The kernel releases the lock when the process ends, however it ends. If the file system has no locks, a
    warning is issued.

    Args:
        folder: The ``--out`` of the run.
        patience: How long to wait for another run to release it.

    Raises:
        OSError: The folder cannot be written to.
        ValueError: Another run holds the lock.
    """
    with writing(f"--out: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    end = time.monotonic() + patience.total_seconds()
    while not _try_lock(descriptor, folder):
        if time.monotonic() >= end:
            os.close(descriptor)
            raise ValueError(
                f"--out: another run is writing to {folder}: wait for its end, or choose another --out."
            )
        time.sleep(1)


def _try_lock(descriptor: int, folder: Path) -> bool:
    """Lock a file; returns False if another process holds the lock, and True if there are no locks."""
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
