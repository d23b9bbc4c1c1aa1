"""Generative models: a variational autoencoder and a normalising flow."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.benchmarks.strangers.networks import mlp
from meta_train.benchmarks.strangers.sources import images
from meta_train.benchmarks.strangers.task import (
    Batch,
    Merit,
    Problem,
    Task,
    generator,
    random_indices,
    seeded,
)

LATENT = 16


class VAE(nn.Module):
    """Variational autoencoder of MLPs, with Gaussian latents (Kingma and Welling 2014)."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.encode = mlp(784, width, 2 * LATENT)
        self.decode = mlp(LATENT, width, 784)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct images [B, 784] from latents sampled with standard normal noise [B, 16].

        Returns:
            Logits of pixels, [B, 784]; means and log standard deviations of latents, [B, 16].
        """
        mean, log_std = self.encode(x).chunk(2, 1)
        return self.decode(mean + log_std.exp() * noise), mean, log_std


def digits(seed: int, root: str | None) -> Problem:
    """Train a VAE on MNIST; the loss is the negative ELBO in nats per image."""
    data = images("mnist", root)

    def batch_of(pixels: Tensor, draws: torch.Generator) -> Batch:
        x = pixels.flatten(1).float() / 255
        return x, torch.randn(len(x), LATENT, generator=draws)

    def of_step(step: int) -> Batch:
        chosen = random_indices(len(data.train_x), 64, seed, step)
        return batch_of(data.train_x[chosen], generator(seed, -2 - step))

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        x, noise = batch
        logits, mean, log_std = net(x, noise)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum()
        return (reconstruction + divergence) / len(x)

    test = batch_of(data.test_x[:1000], generator(0))
    return Problem(seeded(seed, VAE), loss, of_step, lambda net: loss(net, test))


class Flow(nn.Module):
    """Normalising flow in the plane, of affine coupling layers (RealNVP, Dinh et al. 2017)."""

    def __init__(self, steps: int = 6, width: int = 32):
        super().__init__()
        self.steps = nn.ModuleList(mlp(1, width, width, 2) for _ in range(steps))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map points [B, 2] to latents [B, 2], with the log determinant of the Jacobian [B]."""
        log_det = torch.zeros(len(x))
        for step in self.steps:
            kept, changed = x[:, :1], x[:, 1:]
            scale, shift = step(kept).chunk(2, 1)
            scale = torch.tanh(scale)
            x = torch.cat([changed * scale.exp() + shift, kept], 1)
            log_det = log_det + scale[:, 0]
        return x, log_det


def moons(count: int, draws: torch.Generator) -> Tensor:
    """Draw points (count, 2) of two interleaving half circles, with noise."""
    angle = math.pi * torch.rand(count, generator=draws)
    upper = torch.rand(count, generator=draws) < 0.5
    first, second = (angle.cos(), angle.sin()), (1 - angle.cos(), 0.5 - angle.sin())
    x = torch.stack([torch.where(upper, a, b) for a, b in zip(first, second, strict=True)], 1)
    return 2 * (x + 0.08 * torch.randn(count, 2, generator=draws)) - torch.tensor([1.0, 0.5])


def flow(seed: int, root: str | None) -> Problem:
    """Fit a normalising flow to two moons; the loss is the negative log-likelihood per point."""

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        x, log_det = net(batch[0])
        return (0.5 * x.square().sum(1) + math.log(2 * math.pi) - log_det).mean()

    test = (moons(4000, generator(0)),)
    return Problem(
        seeded(seed, Flow),
        loss,
        lambda step: (moons(128, generator(seed, step)),),
        lambda net: loss(net, test),
    )


TASKS = (
    Task("vae", "VAE, MNIST", Merit("nats an image"), 800, digits),
    Task("flow", "RealNVP, two moons", Merit("nats a point"), 800, flow),
)
