"""The tasks: a name -> networks to train, batches to train them on and a loss."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from l2o_graph.registry import registering
from meta_train.tasks.base import Problem, Task
from meta_train.tasks.image_classification import ImageTask, cnn, mlp

Make = TypeVar("Make", bound=Callable[[], Task])

TASKS: dict[str, Task] = {
    "fmnist_cnn": ImageTask("fmnist", cnn, width=16),
    "cifar10_cnn": ImageTask("cifar10", cnn, width=32),
    "mnist_cnn": ImageTask("mnist", cnn, width=16),
    "fmnist_mlp": ImageTask("fmnist", mlp, width=32),
    "fmnist_sample": ImageTask("fmnist_sample", cnn, width=16),
}
"""All tasks by name; ``register_task`` adds to them."""


def register_task(name: str) -> Callable[[Make], Make]:
    """Add a task of one's own: decorates a class, or a function, that makes it without arguments.

    It is known to this process alone: another one, as those of ``--jobs``, has to import the file
    that registers it.

    Args:
        name: To ask for it by.

    Raises:
        ValueError: For a name that another task has, and one with a colon, behind which settings
            of a variant stand.
    """
    if ":" in name:
        raise ValueError(f"expected the name of a task without a colon, found '{name}'")
    return registering(TASKS, name, "task", lambda make: make())


@cache
def get_task(name: str) -> Task:
    """Find the task of a name, or a variant of one: "fmnist_cnn:width=64,batch=32".

    Settings of a variant are ``batch``, ``width`` and what else its network takes: ``depth``
    and ``norm`` (0 or 1) of a CNN.

    Args:
        name: A name of ``TASKS``, and after a colon settings, if any.

    Raises:
        ValueError: For a name or a setting that is not known, and settings of a task without any.
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
    variant = getattr(TASKS[base], "variant", None)
    if variant is None:
        raise ValueError(f"task '{name}': expected no settings, as '{base}' has no variants")
    try:
        return variant(**chosen)
    except ValueError as error:
        raise ValueError(f"task '{name}': {error}") from error


__all__ = ["TASKS", "Problem", "Task", "get_task", "register_task"]
