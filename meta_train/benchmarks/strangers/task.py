"""Tasks of the benchmark: a network, a loss, mini-batches and a figure of merit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Batch = tuple[Any, ...]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, slots=True)
class Merit:
    """Figure of merit: by default a loss or an error, which is positive."""

    name: str  # name with its unit
    higher: bool = False  # whether larger values are better


ACCURACY = Merit("accuracy, %", higher=True)


@dataclass(frozen=True, slots=True)
class Problem:
    """Task at one seed."""

    net: nn.Module  # initialised network in training mode
    loss: Loss  # calls the network once and draws no random numbers
    batch: Callable[[int], Batch]  # step -> batch, always the same for the same step
    evaluate: Callable[[nn.Module], float | Tensor]  # network -> figure of merit

    @torch.no_grad()
    def merit(self) -> float:
        """Evaluate the network, in evaluation mode."""
        self.net.eval()
        try:
            return float(self.evaluate(self.net))
        finally:
            self.net.train()


Make = Callable[[int, str | None], Problem]  # (seed, folder of datasets) -> problem


@dataclass(frozen=True, slots=True)
class Task:
    """Training problem of the benchmark, at any seed."""

    name: str
    label: str  # title in reports
    merit: Merit  # figure of merit on held-out data
    steps: int  # number of training steps
    make: Make
    library: str = ""  # module of another package that the task needs


def generator(seed: int, step: int = -1) -> torch.Generator:
    """Create the random generator of a seed and step; -1 is for what precedes training."""
    return torch.Generator().manual_seed(1_000_003 * seed + step + 1)


def random_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Draw the indices (batch,) of a step's examples among ``count``, with replacement."""
    return torch.randint(count, (batch,), generator=generator(seed, step))


def random_batches(examples: Batch, batch: int, seed: int) -> Callable[[int], Batch]:
    """Return a function that draws the batch of a step from tensors [examples, ...]."""

    def of_step(step: int) -> Batch:
        chosen = random_indices(len(examples[0]), batch, seed, step)
        return tuple(tensor[chosen] for tensor in examples)

    return of_step


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network, with a seed for torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def linear_decay(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Create a schedule whose learning rate falls linearly to 0 over the steps."""
    return LambdaLR(optimizer, lambda step: 1 - step / steps)


def cross_entropy(net: nn.Module, batch: Batch) -> Tensor:
    """Compute the cross-entropy of (inputs, labels), in nats."""
    inputs, labels = batch
    return F.cross_entropy(net(inputs), labels)


def mse(net: nn.Module, batch: Batch) -> Tensor:
    """Compute the mean squared error of (inputs, targets)."""
    inputs, targets = batch
    return F.mse_loss(net(inputs), targets)


def accuracy(net: nn.Module, inputs: Tensor, labels: Tensor, chunk: int = 500) -> float:
    """Compute the accuracy in %, for a chunk of the inputs at a time."""
    predicted = [net(part).argmax(-1) for part in inputs.split(chunk)]
    return 100 * float((torch.cat(predicted) == labels).float().mean())
