"""Prodigy+ Schedule-Free for sharded models: parameters that are DTensors of any mesh."""

from prodigyplus_dist.optimizer import ShardedProdigyPlusScheduleFree

__all__ = ["ShardedProdigyPlusScheduleFree"]
