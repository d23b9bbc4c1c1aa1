"""Coordinate networks: implicit neural representations of images, and a PINN."""

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
    mse,
    random_batches,
    seeded,
)

OMEGA = 30.0  # frequency of a SIREN
CONDUCTIVITY = 0.05
MODES = ((1, 1.0), (3, 0.5))  # (k, amplitude) of sin(k pi x) in the initial temperature


class Sine(nn.Module):
    """Activation sin(30 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return torch.sin(OMEGA * x)


class Siren(nn.Module):
    """MLP with sine activations, initialised as in Sitzmann et al. 2020."""

    def __init__(self, width: int = 40):
        super().__init__()
        self.layers = mlp(2, width, width, width, 3, activation=Sine)
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(linear):
            fan_in = layer.weight.shape[1]
            bound = 1 / fan_in if i == 0 else math.sqrt(6 / fan_in) / OMEGA
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Compute colours from coordinates, [Q, 2] -> [Q, 3]."""
        return self.layers(x)


class Fourier(nn.Module):
    """MLP on random Fourier features (Tancik et al. 2020)."""

    waves: Tensor  # frequencies, [2, width / 2]

    def __init__(self, width: int = 64, scale: float = 4.0):
        super().__init__()
        self.register_buffer("waves", scale * torch.randn(2, width // 2))
        self.layers = mlp(width, width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Compute colours from coordinates, [Q, 2] -> [Q, 3]."""
        angles = math.pi * x @ self.waves
        return self.layers(torch.cat([angles.sin(), angles.cos()], 1))


def _photograph(seed: int, root: str | None) -> tuple[Tensor, Tensor]:
    """Load coordinates (1024, 2) and colours (1024, 3), both in [-1, 1], of a CIFAR-10 image."""
    pixels = images("cifar10", root).test_x[seed]
    axis = torch.linspace(-1, 1, 32)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    return points, pixels.flatten(1).T.float() / 127.5 - 1


def photograph(seed: int, root: str | None) -> Problem:
    """Fit a SIREN to a photograph, evaluated on all pixels."""
    pixels = _photograph(seed, root)
    batches = random_batches(pixels, 512, seed)
    return Problem(seeded(seed, Siren), mse, batches, lambda net: mse(net, pixels))


def missing_pixels(seed: int, root: str | None) -> Problem:
    """Reconstruct half of a photograph's pixels from the other half."""
    points, colours = _photograph(seed, root)
    order = torch.randperm(len(points), generator=generator(seed))
    shown, hidden = order[:512], order[512:]
    test = points[hidden], colours[hidden]
    batches = random_batches((points[shown], colours[shown]), 256, seed)
    return Problem(seeded(seed, Fourier), mse, batches, lambda net: mse(net, test))


def temperature(points: Tensor) -> Tensor:
    """Compute the exact solution of the heat equation at points (time, place), [Q, 2] -> [Q]."""
    time, place = points.T
    return sum(
        (
            size * (-CONDUCTIVITY * (k * math.pi) ** 2 * time).exp() * (k * math.pi * place).sin()
            for k, size in MODES
        ),
        torch.zeros_like(time),
    )


def heat(seed: int, root: str | None) -> Problem:
    """Solve the heat equation with a PINN: residual, initial and boundary conditions."""

    def of_step(step: int) -> Batch:
        draws = generator(seed, step)
        inner = torch.rand(192, 2, generator=draws)
        edge = torch.rand(64, 2, generator=draws)
        edge[:32, 0] = 0.0  # initial temperature
        edge[32:, 1] = (edge[32:, 1] > 0.5).float()  # both ends, of temperature 0
        return torch.cat([inner, edge]), len(inner), temperature(edge)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        points, inside, known = batch
        points = points.clone().requires_grad_()
        u = net(points)[:, 0]
        first = torch.autograd.grad(u[:inside].sum(), points, create_graph=True)[0]
        second = torch.autograd.grad(first[:inside, 1].sum(), points, create_graph=True)[0]
        residual = first[:inside, 0] - CONDUCTIVITY * second[:inside, 1]  # u_t - c u_xx
        return residual.square().mean() + 10 * F.mse_loss(u[inside:], known)

    test = torch.rand(2000, 2, generator=generator(0))
    true = temperature(test)

    def evaluate(net: nn.Module) -> Tensor:
        return (net(test)[:, 0] - true).norm() / true.norm()

    net = seeded(seed, lambda: mlp(2, 48, 48, 48, 1, activation=nn.Tanh))
    return Problem(net, loss, of_step, evaluate)


TASKS = (
    Task("siren", "SIREN of a photograph", Merit("mean square"), 1200, photograph),
    Task("fourier", "Fourier features, missing pixels", Merit("mean square"), 1000,
         missing_pixels),
    Task("pinn", "PINN, heat equation", Merit("relative error"), 1500, heat),
)  # fmt: skip
