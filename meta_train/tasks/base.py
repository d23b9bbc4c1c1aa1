"""What a task offers to the meta-trainer and to the benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from l2o_graph.layout.spec import NetSpec


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
    """A family of problems.

    Attributes:
        guess_loss: Loss of a guess, above 0, in the unit of its problems' losses: that of the best
            constant answer. A run that ends there has failed.
    """

    guess_loss: float

    def load(self, root: str | Path | None) -> str:
        """Load the data once, from a folder or where it is otherwise; say what it is."""
        ...

    def problem(self, seed: int, device: torch.device) -> Problem:
        """Make a problem: the network, initialised by the seed, on a device, and its batches."""
        ...
