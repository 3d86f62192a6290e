"""The training text: the bytes of a folder of files, and batches drawn from them."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HELD_OUT_EVERY = 10  # files
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

Batch = tuple[Tensor, Tensor]
"""Bytes, and the bytes that follow each of them; both (windows, context)."""


class Corpus(NamedTuple):
    """Bytes to train on, held-out bytes, and a summary that identifies the corpus."""

    training: Tensor
    held_out: Tensor
    summary: str

    def to(self, device: torch.device) -> Corpus:
        """The corpus on a device."""
        return Corpus(self.training.to(device), self.held_out.to(device), self.summary)


def standard_library() -> Iterator[Path]:
    """The sources of Python's standard library without its tests, which every machine has."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return (
        path
        for path in folder.rglob("*.py")
        if EXCLUDED_FOLDERS.isdisjoint(path.relative_to(folder).parent.parts)
    )


def files_in(folder: Path, pattern: str) -> Iterator[Path]:
    """The files below a folder that match a pattern, without hidden ones.

    Raises:
        OSError: The folder does not exist.
        ValueError: The pattern is invalid.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"--data: {folder} is not a folder")
    try:
        if ".." in Path(pattern).parts:
            raise ValueError("it leads out of the folder")
        paths = list(folder.rglob(pattern))
    except (ValueError, NotImplementedError, IndexError) as error:  # the latter two for an absolute pattern
        raise ValueError(
            f"--pattern {pattern!r}: {error}; name files below --data, as *.txt or part/*.txt."
        ) from error
    return (
        path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read(paths: Iterable[Path], context: int) -> Corpus:
    """The contents of files, in the order of their paths; every tenth file is held out.

    Whole files are held out, since parts of one file resemble each other.

    Raises:
        OSError: A file cannot be read.
        ValueError: The training or the held-out text is too short for a window of ``context`` bytes.
    """
    texts = [path.read_bytes() for path in sorted(paths) if path.is_file()]
    texts = [text for text in texts if text]
    held_out = b"".join(texts[::HELD_OUT_EVERY])
    training = b"".join(text for index, text in enumerate(texts) if index % HELD_OUT_EVERY)
    for part, name in ((training, "train on"), (held_out, "be held out")):
        if len(part) <= context:
            raise ValueError(
                f"--data: of {len(texts)} files {len(part)} bytes would {name}, too few for a --context of "
                f"{context}: every {HELD_OUT_EVERY}th file, from the first, is held out."
            )
    digest = hashlib.sha256(training + held_out).hexdigest()
    summary = f"{len(texts)} files, {len(training) + len(held_out)} bytes, sha256 {digest[:16]}"
    return Corpus(_tensor(training), _tensor(held_out), summary)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def random_windows(text: Tensor, context: int, count: int, seed: int, step: int) -> Batch:
    """Random windows for a step, which depend on seed and step alone, not on earlier draws."""
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - context, count)
    return windows(text, starts.tolist(), context)


def even_windows(text: Tensor, context: int, count: int) -> Batch:
    """Windows spread evenly over a text."""
    starts = np.linspace(0, len(text) - context - 1, count).astype(np.int64)
    return windows(text, starts.tolist(), context)


def windows(text: Tensor, starts: list[int], context: int) -> Batch:
    """The windows of a text that begin at ``starts``."""
    indices = torch.tensor(starts, device=text.device).unsqueeze(1) + torch.arange(
        context + 1, device=text.device
    )
    chosen = text[indices].long()
    return chosen[:, :-1], chosen[:, 1:]
