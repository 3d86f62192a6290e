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
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

SUMS = "SHA256SUMS"
METADATA = ".metadata"


class Writer(FileSystemWriter):
    """Writes to a hidden draft, which takes its name when all processes have written their files.

    Args:
        path: The folder, the same in all processes. One that is there is replaced.
        texts: Other files in it, by their names.
    """

    def __init__(self, path: Path, texts: Mapping[str, str]) -> None:
        self._draft, self._final = draft_of(path), path
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
        remove(self._final)
        self._draft.rename(self._final)
        _sync(self._final.parent)


class Reader(FileSystemReader):
    """Reads a folder whose sums have been checked (see :func:`check`)."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What is where."""
        with Path(self.path, METADATA).open("rb") as file:
            metadata: Metadata = MetadataUnpickler(file).load()
        return metadata


class LoadPlanner(DefaultLoadPlanner):
    """Takes numbers, texts and containers of them beside tensors; torch's own would take any pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put one of them into the state that is loaded."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles a description of tensors, and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module.partition(".")[0], name) == ("pathlib", "PosixPath"):  # 3.13 names a part of the module
            return PurePosixPath
        if name not in _NEEDED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


_NEEDED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
}


def draft_of(path: Path) -> Path:
    """Where a folder is before it is whole; and after, while it is being removed."""
    return path.with_name(f".{path.name}")


def remove(path: Path) -> None:
    """Remove a folder, at once; one that is not there is removed already."""
    if path.exists():
        rest = path.with_name(f".{path.name}.removed")
        shutil.rmtree(rest, ignore_errors=True)
        path.rename(rest)
        shutil.rmtree(rest)


def check(path: Path, share: int = 0, count: int = 1) -> None:
    """See to it that a folder is as it was written.

    Args:
        path: The folder.
        share, count: Read the files of one share of so many; processes check a folder together.

    Raises:
        OSError: A file is missing, or not what it was.
    """
    for name in sorted(sums_in(path))[share::count]:
        check_file(path, name)


def check_file(path: Path, name: str) -> None:
    """See to it that a file of a folder is as it was written.

    Raises:
        OSError: It is missing, or not what it was.
    """
    expected = sums_in(path).get(name)
    if expected is None:
        raise OSError(f"{path / SUMS} is damaged: it has no sum of {name}")
    if not (path / name).is_file():
        raise FileNotFoundError(f"{path / name} is missing")
    if (found := sum_of(path / name)) != expected:
        size = (path / name).stat().st_size
        raise OSError(
            f"{path / name} is damaged: its {size} bytes have the SHA-256 sum {found}, not the {expected} "
            "that they were written with"
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
        if len(sum_) != 64 or not name.endswith("\n"):
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
