"""The tasks, one file for each family; a new task is an entry in the TASKS of its file."""

from __future__ import annotations

from ..task import Task
from . import addition, convex, diffusion, experts, images, lora, mnist, regression, text

FAMILIES = (mnist, images, text, addition, convex, regression, lora, diffusion, experts)
TASKS: dict[str, Task] = {task.name: task for family in FAMILIES for task in family.TASKS}
