"""What a task is: a network, a loss, batches and a figure of merit."""

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
Judge = Callable[[nn.Module], float]  # with the network in evaluation mode


@dataclass(frozen=True, slots=True)
class Merit:
    """A figure of merit: its name, with its unit, and whether more of it is better."""

    name: str
    higher: bool


ACCURACY = Merit("accuracy, %", higher=True)


def lower(name: str) -> Merit:
    """A loss or an error; always positive."""
    return Merit(name, higher=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """A task at one seed.

    Attributes:
        net: Initialised; in training mode.
        loss: Loss of the network on a batch; it calls ``net`` once, and draws no random numbers.
        batch: Batch of each step, the same whenever it is asked for.
        evaluate: The figure of merit of the network as it is, in evaluation mode.
    """

    net: nn.Module
    loss: Loss
    batch: Callable[[int], Batch]
    evaluate: Judge


Make = Callable[[int, str | None], Problem]  # of a seed and a data root


@dataclass(frozen=True, slots=True)
class Task:
    """Something that people train."""

    name: str
    label: str
    merit: Merit  # what it is judged by, on data held out
    steps: int  # of a whole run
    make: Make
    library: str = ""  # that it needs beside the project's own, by the name of its import


def generator(seed: int, step: int = -1) -> torch.Generator:
    """Random numbers for a step of a seed, or for what comes before all steps."""
    return torch.Generator().manual_seed(1_000_003 * seed + step + 1)


def pick(count: int, batch: int, seed: int, step: int) -> Tensor:
    """The examples of a step, out of so many."""
    return torch.randint(count, (batch,), generator=generator(seed, step))


def batches_of(examples: Batch, batch: int, seed: int) -> Callable[[int], Batch]:
    """Batches out of some examples, tensors of one length; each is drawn anew."""

    def of_step(step: int) -> Batch:
        chosen = pick(len(examples[0]), batch, seed, step)
        return tuple(tensor[chosen] for tensor in examples)

    return of_step


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A network with the initialisation of a seed; torch takes it from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def falling(optimizer: Optimizer, steps: int) -> LambdaLR:
    """A schedule by which the rate falls linearly to 0 in so many steps."""
    return LambdaLR(optimizer, lambda step: 1 - step / steps)


@torch.no_grad()
def measured(net: nn.Module, evaluate: Judge) -> float:
    """The figure of merit, with the network in evaluation mode for as long as it takes."""
    net.eval()
    try:
        return float(evaluate(net))
    finally:
        net.train()


def cross_entropy(net: nn.Module, batch: Batch) -> Tensor:
    """Of inputs and labels, in nats."""
    inputs, labels = batch
    return F.cross_entropy(net(inputs), labels)


def squared(net: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of what is answered to inputs."""
    return F.mse_loss(net(batch[0]), batch[1])


def percent_right(net: nn.Module, inputs: Tensor, labels: Tensor, chunk: int = 500) -> float:
    """Accuracy in %."""
    answers = [net(part).argmax(-1) for part in inputs.split(chunk)]
    return 100 * float((torch.cat(answers) == labels).float().mean())
