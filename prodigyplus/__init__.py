"""Prodigy+ Schedule-Free: an optimiser without a learning rate or a schedule to choose."""

from prodigyplus.grouping import describe_groups, muon_groups
from prodigyplus.optimizer import ProdigyPlusScheduleFree

__all__ = ["ProdigyPlusScheduleFree", "describe_groups", "muon_groups"]
