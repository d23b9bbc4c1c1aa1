"""Networks that learn a distribution: an autoencoder with noise, a flow."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.benchmarks.strangers.networks import mlp
from meta_train.benchmarks.strangers.sources import images
from meta_train.benchmarks.strangers.task import (
    Batch,
    Problem,
    Task,
    generator,
    lower,
    pick,
    seeded,
)

CODE = 16


class VAE(nn.Module):
    """Images to a code of means and deviations, and a drawn code to images."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.encode = mlp(784, width, 2 * CODE)
        self.decode = mlp(CODE, width, 784)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the pixels, means and log deviations."""
        mean, size = self.encode(x).chunk(2, 1)
        return self.decode(mean + size.exp() * noise), mean, size


def digits(seed: int, root: str | None) -> Problem:
    """A variational autoencoder of MNIST; nats an image, the negative lower bound."""
    data = images("mnist", root)

    def batch_of(pixels: Tensor, draws: torch.Generator) -> Batch:
        x = pixels.flatten(1).float() / 255
        return x, torch.randn(len(x), CODE, generator=draws)

    def of_step(step: int) -> Batch:
        chosen = pick(len(data.train_x), 64, seed, step)
        return batch_of(data.train_x[chosen], generator(seed, -2 - step))

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        x, noise = batch
        scores, mean, size = net(x, noise)
        seen = F.binary_cross_entropy_with_logits(scores, x, reduction="sum")
        apart = 0.5 * (mean.square() + (2 * size).exp() - 1 - 2 * size).sum()
        return (seen + apart) / len(x)

    tested = batch_of(data.test_x[:1000], generator(0))
    return Problem(seeded(seed, VAE), loss, of_step, lambda net: float(loss(net, tested)))


class Flow(nn.Module):
    """Six steps that each move one coordinate by what the other says (RealNVP)."""

    def __init__(self, steps: int = 6, width: int = 32):
        super().__init__()
        self.steps = nn.ModuleList(mlp(1, width, width, 2) for _ in range(steps))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where points go, and the logarithm of how much room they take there."""
        room = torch.zeros(len(x))
        for step in self.steps:
            kept, changed = x[:, :1], x[:, 1:]
            size, shift = step(kept).chunk(2, 1)
            size = torch.tanh(size)
            x = torch.cat([changed * size.exp() + shift, kept], 1)
            room = room + size[:, 0]
        return x, room


def moons(count: int, draws: torch.Generator) -> Tensor:
    """Points of two half circles that reach into each other, some four across."""
    angle = math.pi * torch.rand(count, generator=draws)
    upper = torch.rand(count, generator=draws) < 0.5
    first, second = (angle.cos(), angle.sin()), (1 - angle.cos(), 0.5 - angle.sin())
    x = torch.stack([torch.where(upper, a, b) for a, b in zip(first, second, strict=True)], 1)
    return 2 * (x + 0.08 * torch.randn(count, 2, generator=draws)) - torch.tensor([1.0, 0.5])


def flow(seed: int, root: str | None) -> Problem:
    """A normalising flow of two moons; nats a point."""

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        x, room = net(batch[0])
        return (0.5 * x.square().sum(1) + math.log(2 * math.pi) - room).mean()

    tested = (moons(4000, generator(0)),)
    return Problem(
        seeded(seed, Flow),
        loss,
        lambda step: (moons(128, generator(seed, step)),),
        lambda net: float(loss(net, tested)),
    )


TASKS = (
    Task("vae", "VAE, MNIST", lower("nats an image"), 800, digits),
    Task("flow", "RealNVP, two moons", lower("nats a point"), 800, flow),
)
