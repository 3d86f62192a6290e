"""Other packages that ours is compared with, and where they are imported from."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 180  # seconds for an installation
LONGEST = 160  # characters of an error

OURS = "prodigyplus:ProdigyPlusScheduleFree"
OURS_SHARDED = "prodigyplus_dist:ShardedProdigyPlusScheduleFree"


@dataclass(frozen=True, slots=True)
class Peer:
    """A package, and what it needs besides what is installed here."""

    distribution: str
    version: str
    repository: str = ""  # on GitHub, for a package that is not released
    commit: str = ""
    beside: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Its folder, within that of all peers."""
        return "-".join((self.distribution, self.version, *([self.commit[:12]] if self.commit else [])))

    @property
    def told(self) -> str:
        """The version, with its commit."""
        return f"{self.version} at {self.commit[:12]}" if self.commit else self.version


PUBLISHED = Peer("prodigy-plus-schedule-free", "2.0.1")
SCHEDULEFREE = Peer("schedulefree", "1.4.1")
PRODIGY = Peer("prodigyopt", "1.1.2")
HEAVYBALL = Peer("heavyball", "3.2.1", beside=("opt-einsum==3.4.0",))
DION = Peer("dion", "0.1.0", "microsoft/dion", "0a059a4542e5aa74b40dcd1dce363836c7afcd48")
MUON_FSDP2 = Peer("muon-fsdp2", "0.3.0")
MUONIUM = Peer("muonium", "0.2.0")


class PeerError(Exception):
    """Why a package is missing."""


def install(peer: Peer, peers: Path) -> Path:
    """Install a package into a folder of its own, unless it is there already; returns the folder.

    Raises:
        PeerError: pip could not.
    """
    folder = peers / peer.folder
    if folder.is_dir():
        return folder
    part = peers / f"{peer.folder}.part"  # an interrupted installation must not look complete
    shutil.rmtree(part, ignore_errors=True)
    wanted = f"{peer.distribution}=={peer.version}"
    if peer.repository:
        wanted = f"{peer.distribution} @ git+https://github.com/{peer.repository}@{peer.commit}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part), wanted]
    try:
        subprocess.run([*pip, *peer.beside], check=True, capture_output=True, text=True, timeout=LIMIT)
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise PeerError(f"not installed: {said[:LONGEST]}") from error
    part.rename(folder)
    return folder


def load(place: str, home: Path | None = None) -> Any:
    """The object at a place, ``module:name``.

    Args:
        place: Where it is.
        home: The folder that its module has to come from; None: any.

    Raises:
        ImportError: It is not there.
    """
    module, name = place.split(":")
    found = importlib.import_module(module)
    if home is not None and not Path(found.__file__ or "").resolve().is_relative_to(home.resolve()):
        raise ImportError(f"{module} came from {found.__file__}, not from {home.name}")
    try:
        return getattr(found, name)
    except AttributeError:
        raise ImportError(f"cannot import name {name!r} from {module!r}") from None
