"""Prodigy+ Schedule-Free for sharded models: parameters that are DTensors of any mesh."""

from prodigyplus_dist.optimizer import ShardedProdigyPlusScheduleFree
from prodigyplus_dist.replicas import check_replicas

__all__ = ["ShardedProdigyPlusScheduleFree", "check_replicas"]
