"""Folders of sharded tensors as torch's distributed checkpoint writes them, whole or not there.

Beside the tensors lie other texts and ``SHA256SUMS``, in the form of the program ``sha256sum``. What is read
back must have these sums, and no pickle in it may name more than it takes to describe tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch_private import METADATA_NAMES

SUMS = "SHA256SUMS"
METADATA = ".metadata"


class Writer(FileSystemWriter):
    """Writes to a hidden draft, which takes its name when all processes have written their files.

    Args:
        path: The folder, the same in all processes. One that is there is replaced.
        texts: Other files in it, by their names; those of rank 0 count.
        writer: A name for who writes, the same in all processes: what another run leaves in a draft of the
            same folder does not get into this one.
    """

    def __init__(self, path: Path, texts: Mapping[str, str], writer: str) -> None:
        self._draft, self._final = path.with_name(f".{path.name}.{writer}"), path
        super().__init__(self._draft)
        self._texts = texts

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's tensors, and tell the sums of their files with where they are."""
        results = super().write_data(plan, planner).wait()
        sums = {name: sum_of(self._draft / name) for name in {r.storage_data.relative_path for r in results}}
        told: Future[list[WriteResult]] = Future()
        told.set_result(
            [
                dataclasses.replace(r, storage_data=(r.storage_data, sums[r.storage_data.relative_path]))
                for r in results
            ]
        )
        return told

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """In one process, when all have written: add the rest, and put the folder in its place."""
        everyone = [result for each in results for result in each]
        sums = {place.relative_path: sum_ for place, sum_ in (r.storage_data for r in everyone)}
        places = [dataclasses.replace(r, storage_data=r.storage_data[0]) for r in everyone]
        super().finish(metadata, [places])
        for name, text in self._texts.items():
            _write(self._draft / name, text)
        sums |= {name: sum_of(self._draft / name) for name in (METADATA, *self._texts)}
        _write(self._draft / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
        _sync(self._draft)
        if self._final.exists():
            remove(self._final)
        self._draft.rename(self._final)
        _sync(self._final.parent)


def load(state: dict[str, Any], path: Path) -> None:
    """Fill the tensors and the rest of a state dict with what is in a folder; processes do so together.

    See to it first that the folder is as it was written (:func:`check`).

    Raises:
        CheckpointException: It holds other things, or things that are not safe to read.
    """
    dcp_load(state, storage_reader=_Reader(path), planner=_LoadPlanner())


class _Reader(FileSystemReader):
    """Unpickles no more than descriptions of tensors, and reads no file that has no sum."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path)
        with (path / METADATA).open("rb") as file:
            metadata: Metadata = MetadataUnpickler(file).load()
        named = {place.relative_path for place in metadata.storage_data.values()}
        if without := named - sums_in(path).keys():
            raise OSError(f"{path / METADATA} names {min(without)!r}, of which {SUMS} has no sum")
        return metadata


class _LoadPlanner(DefaultLoadPlanner):
    """Takes numbers, texts and containers of them beside tensors; torch's own would take any pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        safe = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


_PythonUnpickler: Any = vars(pickle)["_Unpickler"]  # that in C has no methods to override


class MetadataUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Unpickles a description of tensors, and refuses to call, or to change, anything else."""

    dispatch: ClassVar = {**_PythonUnpickler.dispatch}

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module.partition(".")[0], name) == ("pathlib", "PosixPath"):  # 3.13 names a part of the module
            return PurePosixPath
        if name not in METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which describes no tensor")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set attributes; of what was made, not of what was named."""
        if isinstance(self.stack[-2], (type, FunctionType)):
            raise pickle.UnpicklingError(f"it sets attributes of {self.stack[-2].__qualname__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def remove(path: Path) -> None:
    """Remove a folder, at once: while it goes, it is hidden, as a draft is."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def clean(folder: Path) -> None:
    """Remove the drafts that killed runs have left in a folder, and what they had begun to remove."""
    for path in folder.glob(".*"):
        if path.is_dir() and re.fullmatch(r"\.\d+\.\w+", path.name):
            shutil.rmtree(path)


def check(path: Path, share: int = 0, count: int = 1) -> None:
    """See to it that a folder is as it was written.

    Args:
        path: The folder.
        share, count: Read the files of one share of so many; processes check a folder together.

    Raises:
        OSError: A file is missing, or not what it was.
    """
    for name, expected in sorted(sums_in(path).items())[share::count]:
        _check_file(path / name, expected)


def check_file(path: Path, name: str) -> None:
    """See to it that a file of a folder is as it was written.

    Raises:
        OSError: It is missing, or not what it was.
    """
    expected = sums_in(path).get(name)
    if expected is None:
        raise OSError(f"{path / SUMS} is damaged: it has no sum of {name}")
    _check_file(path / name, expected)


def _check_file(path: Path, expected: str) -> None:
    try:
        found, size = sum_of(path), path.stat().st_size
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    if found != expected:
        raise OSError(
            f"{path} is damaged: its {size} bytes have the SHA-256 sum {found}, not the {expected} that they "
            "were written with"
        )


def sums_in(path: Path) -> dict[str, str]:
    """The sums that a folder tells of its files.

    Raises:
        OSError: It tells none.
    """
    if not (path / SUMS).is_file():
        raise FileNotFoundError(f"{path / SUMS} is missing: {path} is no checkpoint of this script")
    sums = {}
    for line in (path / SUMS).read_text(errors="replace").splitlines(keepends=True):
        sum_, _, name = line.partition("  ")
        if len(sum_) != 64 or not name.endswith("\n") or "/" in name:
            raise OSError(f"{path / SUMS} is damaged: {line!r} is not a sum and a name")
        sums[name[:-1]] = sum_
    return sums


def sum_of(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """See to it that the names in a folder outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
