"""Tasks by name: networks to train, with mini-batches and a loss.

The paper's rule is meta-trained on them, and benchmarks have them in addition to their own.
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
    """Network and its data on a device.

    Attributes:
        module: Network with the initial parameters.
        spec: Specification of its graph, as in ``neural_graph(module).spec``.
    """

    module: nn.Module
    spec: NetSpec

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step, counted from 0; always the same for a step."""
        ...

    def loss(self, parameters: Sequence[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the loss of the network with given parameters on a batch; differentiable."""
        ...

    def accuracy(self, parameters: Sequence[Tensor]) -> float:
        """Compute the accuracy on held-out examples, from 0 to 1, with given parameters."""
        ...


@runtime_checkable
class Task(Protocol):
    """Distribution of problems."""

    def load(self, root: str | Path | None) -> str:
        """Load the data, from a folder or the default one; return a description of it."""
        ...

    def problem(self, seed: int, device: torch.device) -> Problem:
        """Create a problem on a device, with initial parameters and batches of the seed."""
        ...


Make = TypeVar("Make", bound=Callable[[], Task])

TASKS: dict[str, Task] = {
    "fmnist_cnn": ImageTask("fmnist", cnn, width=16),
    "cifar10_cnn": ImageTask("cifar10", cnn, width=32),
    "mnist_cnn": ImageTask("mnist", cnn, width=16),
    "fmnist_mlp": ImageTask("fmnist", mlp, width=32),
    "fmnist_sample": ImageTask("fmnist_sample", cnn, width=16),
}
"""Tasks by name; ``register_task`` adds to them."""


def register_task(name: str) -> Callable[[Make], Make]:
    """Register a task: a decorator of a class or function that creates it without arguments.

    The task is registered in this process only. Others, such as those of ``--jobs``, have to import
    the file that registers it.

    Raises:
        ValueError: For a name that is taken, and for one with a colon, which separates the settings
            of a variant.
    """
    if ":" in name:
        raise ValueError(f"expected the name of a task without a colon, found '{name}'")
    return registering(TASKS, name, "task", lambda make: make())


@cache
def get_task(name: str) -> Task:
    """Return a task by name, or a variant of it such as "fmnist_cnn:width=64,batch=32".

    Settings of a variant are ``batch``, ``width`` and for CNNs ``depth``.

    Raises:
        ValueError: For an unknown name or setting, and for settings of a task without variants.
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
