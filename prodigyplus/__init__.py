"""Prodigy+ Schedule-Free: an optimiser without a learning rate or a schedule to choose."""

from prodigyplus.optimizer import ProdigyPlusScheduleFree

__all__ = ["ProdigyPlusScheduleFree"]
