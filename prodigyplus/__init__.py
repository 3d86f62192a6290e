"""Prodigy+ Schedule-Free: an optimiser without a learning rate or a schedule to choose."""

from prodigyplus.grouping import describe_groups, muon_groups
from prodigyplus.optimizer import ProdigyPlusScheduleFree
from prodigyplus.published import ImportReport, import_published

__all__ = ["ImportReport", "ProdigyPlusScheduleFree", "describe_groups", "import_published", "muon_groups"]
