"""Prodigy+ Schedule-Free: an optimiser without a learning rate or a schedule to choose."""

from contextlib import suppress
from importlib import metadata

from prodigyplus.muon_groups import describe_groups, muon_groups
from prodigyplus.optimizer import ProdigyPlusScheduleFree
from prodigyplus.published import ImportReport, import_published
from prodigyplus.reporting import warn_caller

__all__ = ["ImportReport", "ProdigyPlusScheduleFree", "describe_groups", "import_published", "muon_groups"]


__version__ = "unknown"  # a checkout that is not installed
with suppress(metadata.PackageNotFoundError):
    __version__ = metadata.version("prodigyplus-dist")


def _warn_of_the_published_package() -> None:
    try:
        metadata.distribution("prodigy-plus-schedule-free")
    except metadata.PackageNotFoundError:
        return
    warn_caller(
        "prodigy-plus-schedule-free is installed too, into the same folder as prodigyplus-dist: an import "
        "finds whichever came last, and to remove one breaks the other. Uninstall both, then install one."
    )


_warn_of_the_published_package()
