"""A trunk, and a head for each task. Nothing in it knows how it is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from recipes.many_tasks.tasks import TASKS, Task
from recipes.vit import ViT


class ManyHeads(nn.Module):
    """Pictures and a task's name to that task's answers. The other heads are not used then, and get no gradients.

    Attributes:
        tasks: in the order in which they take turns.
    """

    def __init__(self, trunk: ViT, size: int, patch: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.tasks: Sequence[Task] = [task(trunk, size, patch) for task in TASKS]
        self.heads = nn.ModuleDict({task.name: task.head for task in self.tasks})

    def forward(self, pictures: Tensor, task: str) -> Tensor:
        answers: Tensor = self.heads[task](self.trunk(pictures))
        return answers
