"""The tasks: a name -> networks to train, batches to train them on and a loss."""

from meta_train.tasks.base import Problem, Task
from meta_train.tasks.image_classification import ImageTask, cnn, mlp

TASKS: dict[str, Task] = {
    "fmnist_cnn": ImageTask("fmnist", cnn, width=16),
    "cifar10_cnn": ImageTask("cifar10", cnn, width=32),
    "fmnist_mlp": ImageTask("fmnist", mlp, width=32),
    "fmnist_sample": ImageTask("fmnist_sample", cnn, width=16),
}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: For a name that is not known.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task '{name}', expected one of {sorted(TASKS)}")
    return TASKS[name]


__all__ = ["TASKS", "Problem", "Task", "get_task"]
