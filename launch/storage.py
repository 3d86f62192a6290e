"""Folders in the format of torch's distributed checkpoint, which appear whole or not at all.

Besides the tensors a folder holds text files and ``SHA256SUMS``, in the format of the program ``sha256sum``.
Files are read only if their checksums match, and pickles only if they name what describes tensors.
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
    """Writes to a hidden draft folder, which is renamed when all processes have written their files.

    Args:
        path: The folder, the same in all processes. An existing one is replaced.
        texts: Text files to add, by name; those of rank 0 are written.
        writer: A name for this run, the same in all processes: it keeps out what another
            run has left in a draft of the same folder.
    """

    def __init__(self, path: Path, texts: Mapping[str, str], writer: str) -> None:
        self._draft, self._final = path.with_name(f".{path.name}.{writer}"), path
        super().__init__(self._draft)
        self._texts = texts

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's tensors, and return the checksums of their files with their locations."""
        results = super().write_data(plan, planner).wait()
        sums = {
            name: checksum_of(self._draft / name) for name in {r.storage_data.relative_path for r in results}
        }
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                dataclasses.replace(r, storage_data=(r.storage_data, sums[r.storage_data.relative_path]))
                for r in results
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called in one process when all have written: add the other files and rename the folder."""
        flat = [result for of_rank in results for result in of_rank]
        sums = {info.relative_path: checksum for info, checksum in (r.storage_data for r in flat)}
        flat = [dataclasses.replace(r, storage_data=r.storage_data[0]) for r in flat]
        super().finish(metadata, [flat])
        for name, text in self._texts.items():
            _write(self._draft / name, text)
        sums |= {name: checksum_of(self._draft / name) for name in (METADATA, *self._texts)}
        _write(self._draft / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
        _sync(self._draft)
        if self._final.exists():
            remove(self._final)
        self._draft.rename(self._final)
        _sync(self._final.parent)


def load(state: dict[str, Any], path: Path) -> None:
    """Load a folder into a state dict; all processes call it together.

    Call :func:`check` first: the tensors themselves are not verified here.

    Raises:
        CheckpointException: The folder does not match the state dict, or is not safe to read.
    """
    dcp_load(state, storage_reader=_Reader(path), planner=_LoadPlanner())


class _Reader(FileSystemReader):
    """Unpickles nothing but descriptions of tensors, and reads no file without a checksum."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path)
        with (path / METADATA).open("rb") as file:
            metadata: Metadata = MetadataUnpickler(file).load()
        named = {info.relative_path for info in metadata.storage_data.values()}
        if unlisted := named - read_checksums(path).keys():
            raise OSError(f"{path / METADATA} names {min(unlisted)!r}, of which {SUMS} has no sum")
        return metadata


class _LoadPlanner(DefaultLoadPlanner):
    """Loads numbers, strings and containers of them besides tensors; torch's own would load any pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        safe = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


_PythonUnpickler: Any = vars(pickle)["_Unpickler"]  # the one in C cannot be overridden method by method


class MetadataUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Unpickles the description of tensors, and refuses to call or to modify anything else."""

    dispatch: ClassVar = {**_PythonUnpickler.dispatch}

    def find_class(self, module: str, name: str) -> Any:
        """The object of a name, if the pickle may use it."""
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module.partition(".")[0], name) == ("pathlib", "PosixPath"):  # Python 3.13 names a submodule
            return PurePosixPath
        if name not in METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which describes no tensor")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set attributes of instances, but not of classes and functions."""
        if isinstance(self.stack[-2], (type, FunctionType)):
            raise pickle.UnpicklingError(f"it sets attributes of {self.stack[-2].__qualname__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def remove(path: Path) -> None:
    """Remove a folder atomically: it is renamed to a hidden name before its files are deleted."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def clean(folder: Path) -> None:
    """Remove the drafts and half-removed folders that killed runs have left."""
    for path in folder.glob(".*"):
        if path.is_dir() and re.fullmatch(r"\.\d+\.\w+", path.name):
            shutil.rmtree(path)


def check(path: Path, rank: int = 0, size: int = 1) -> None:
    """Verify that the files of a folder are as they were written.

    Args:
        path: The folder.
        rank, size: Verify the part of this rank only; together the processes verify all of it.

    Raises:
        OSError: A file is missing or damaged.
    """
    for name, expected in sorted(read_checksums(path).items())[rank::size]:
        _check_file(path / name, expected)


def check_file(path: Path, name: str) -> None:
    """Verify that one file of a folder is as it was written.

    Raises:
        OSError: It is missing or damaged.
    """
    expected = read_checksums(path).get(name)
    if expected is None:
        raise OSError(f"{path / SUMS} is damaged: it has no sum of {name}")
    _check_file(path / name, expected)


def _check_file(path: Path, expected: str) -> None:
    try:
        found, size = checksum_of(path), path.stat().st_size
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    if found != expected:
        raise OSError(
            f"{path} is damaged: its {size} bytes have the SHA-256 sum {found}, not the {expected} that they "
            "were written with"
        )


def read_checksums(path: Path) -> dict[str, str]:
    """The checksums in a folder's ``SHA256SUMS``, by file name.

    Raises:
        OSError: The file is missing or damaged.
    """
    if not (path / SUMS).is_file():
        raise FileNotFoundError(f"{path / SUMS} is missing: {path} is no checkpoint of this script")
    sums = {}
    for line in (path / SUMS).read_text(errors="replace").splitlines(keepends=True):
        checksum, _, name = line.partition("  ")
        if len(checksum) != 64 or not name.endswith("\n") or "/" in name:
            raise OSError(f"{path / SUMS} is damaged: {line!r} is not a sum and a name")
        sums[name[:-1]] = checksum
    return sums


def checksum_of(path: Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal."""
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
    """Make the names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
