"""The import path of the published package ``prodigy-plus-schedule-free``."""

from prodigyplus.optimizer import ProdigyPlusScheduleFree

__all__ = ["ProdigyPlusScheduleFree"]
