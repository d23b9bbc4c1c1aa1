"""The tasks: a name -> networks to train, batches to train them on and a loss.

They are what the paper's rule is meta-trained on, and what benchmarks take besides their own.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from l2o_graph.layout.spec import NetSpec
from l2o_graph.registry import registering
from meta_train.tasks.image_classification import ImageTask, cnn, mlp


@runtime_checkable
class Problem(Protocol):
    """One network and the data it is trained on, on one device.

    Attributes:
        module: The network; its parameters are where training starts.
        spec: Specification of its graph, as ``neural_graph(module).spec``.
    """

    module: nn.Module
    spec: NetSpec

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Give the batch of one step, counted from 0; the same whenever it is asked for."""
        ...

    def loss(self, parameters: Sequence[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the loss of the network with these parameters on a batch; differentiable."""
        ...

    def accuracy(self, parameters: Sequence[Tensor]) -> float:
        """Compute the fraction of held-out examples that these parameters get right."""
        ...


@runtime_checkable
class Task(Protocol):
    """A family of problems."""

    def load(self, root: str | Path | None) -> str:
        """Load the data once, from a folder or where it is otherwise; say what it is."""
        ...

    def problem(self, seed: int, device: torch.device) -> Problem:
        """Make a problem: the network, initialised by the seed, on a device, and its batches."""
        ...


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

    It is known by a name, to this process alone: another one, as those of ``--jobs``, has to import
    the file that registers it.

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

    Settings of a variant are ``batch``, ``width`` and of a CNN ``depth``.

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
