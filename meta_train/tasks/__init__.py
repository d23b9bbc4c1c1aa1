"""The tasks: a name -> networks to train, batches to train them on and a loss."""

from functools import cache

from meta_train.tasks.base import Problem, Task
from meta_train.tasks.image_classification import ImageTask, cnn, mlp

TASKS: dict[str, ImageTask] = {
    "fmnist_cnn": ImageTask("fmnist", cnn, width=16),
    "cifar10_cnn": ImageTask("cifar10", cnn, width=32),
    "mnist_cnn": ImageTask("mnist", cnn, width=16),
    "fmnist_mlp": ImageTask("fmnist", mlp, width=32),
    "fmnist_sample": ImageTask("fmnist_sample", cnn, width=16),
}


@cache
def get_task(name: str) -> Task:
    """The task of that name, or a variant of one: "fmnist_cnn:width=64,batch=32".

    Settings of a variant are ``batch``, ``width`` and what else its network takes: ``depth``
    and ``norm`` (0 or 1) of a CNN.

    Raises:
        ValueError: For a name or a setting that is not known.
    """
    base, _, settings = name.partition(":")
    if base not in TASKS:
        raise ValueError(f"unknown task '{base}', expected one of {sorted(TASKS)}")
    if not settings:
        return TASKS[base]
    chosen: dict[str, int] = {}
    for setting in settings.split(","):
        key, _, value = setting.partition("=")
        if not value.isdecimal():
            raise ValueError(f"task '{name}': expected e.g. width=64, found '{setting}'")
        chosen[key] = int(value)
    try:
        return TASKS[base].variant(**chosen)
    except ValueError as error:
        raise ValueError(f"task '{name}': {error}") from error


__all__ = ["TASKS", "Problem", "Task", "get_task"]
