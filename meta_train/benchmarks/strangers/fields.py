"""Networks that are functions: of a picture's coordinates, of a differential equation."""

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
    batches_of,
    generator,
    lower,
    seeded,
    squared,
)

OMEGA = 30.0  # of a SIREN
CONDUCTIVITY = 0.05
MODES = ((1, 1.0), (3, 0.5))  # of the temperature at the start: sin(k pi x), and how much of it


class Sine(nn.Module):
    """sin(30 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Of each number."""
        return torch.sin(OMEGA * x)


class Siren(nn.Module):
    """Sines all the way, initialised as its authors do (Sitzmann et al. 2020)."""

    def __init__(self, width: int = 40):
        super().__init__()
        self.layers = mlp(2, width, width, width, 3, activation=Sine)
        kernels = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(kernels):
            fan_in = layer.weight.shape[1]
            bound = 1 / fan_in if i == 0 else math.sqrt(6 / fan_in) / OMEGA
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Colours (points, 3) of coordinates (points, 2)."""
        return self.layers(x)


class Fourier(nn.Module):
    """Sines and cosines of fixed random frequencies, then an MLP (Tancik et al. 2020)."""

    waves: Tensor

    def __init__(self, width: int = 64, scale: float = 4.0):
        super().__init__()
        self.register_buffer("waves", scale * torch.randn(2, width // 2))
        self.layers = mlp(width, width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Colours (points, 3) of coordinates (points, 2)."""
        angles = math.pi * x @ self.waves
        return self.layers(torch.cat([angles.sin(), angles.cos()], 1))


def _picture(seed: int, root: str | None) -> tuple[Tensor, Tensor]:
    """Coordinates in [-1, 1] and colours in [-1, 1] of a photograph of 32 x 32 pixels."""
    pixels = images("cifar10", root).test_x[seed]
    axis = torch.linspace(-1, 1, 32)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    return places, pixels.flatten(1).T.float() / 127.5 - 1


def photograph(seed: int, root: str | None) -> Problem:
    """A SIREN learns a photograph by heart; judged on all of it, there is nothing else."""
    pixels = _picture(seed, root)
    batches = batches_of(pixels, 512, seed)
    return Problem(seeded(seed, Siren), squared, batches, lambda net: float(squared(net, pixels)))


def missing_pixels(seed: int, root: str | None) -> Problem:
    """Half of a photograph's pixels, filled in from the other half."""
    places, colours = _picture(seed, root)
    order = torch.randperm(len(places), generator=generator(seed))
    shown, hidden = order[:512], order[512:]
    tested = places[hidden], colours[hidden]
    batches = batches_of((places[shown], colours[shown]), 256, seed)
    return Problem(seeded(seed, Fourier), squared, batches, lambda net: float(squared(net, tested)))


def temperature(points: Tensor) -> Tensor:
    """The solution that the network has to find, at (time, place)."""
    time, place = points.T
    return sum(
        (
            size * (-CONDUCTIVITY * (k * math.pi) ** 2 * time).exp() * (k * math.pi * place).sin()
            for k, size in MODES
        ),
        torch.zeros_like(time),
    )


def heat(seed: int, root: str | None) -> Problem:
    """The heat equation from its residual, first temperatures and cold ends (a PINN)."""

    def of_step(step: int) -> Batch:
        draws = generator(seed, step)
        inner = torch.rand(192, 2, generator=draws)
        edge = torch.rand(64, 2, generator=draws)
        edge[:32, 0] = 0.0
        edge[32:, 1] = (edge[32:, 1] > 0.5).float()
        return torch.cat([inner, edge]), len(inner), temperature(edge)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        points, inside, known = batch
        points = points.clone().requires_grad_()
        answer = net(points)[:, 0]
        slope = torch.autograd.grad(answer[:inside].sum(), points, create_graph=True)[0]
        bend = torch.autograd.grad(slope[:inside, 1].sum(), points, create_graph=True)[0]
        residual = slope[:inside, 0] - CONDUCTIVITY * bend[:inside, 1]
        return residual.square().mean() + 10 * F.mse_loss(answer[inside:], known)

    tested = torch.rand(2000, 2, generator=generator(0))
    true = temperature(tested)

    def evaluate(net: nn.Module) -> float:
        return float((net(tested)[:, 0] - true).norm() / true.norm())

    net = seeded(seed, lambda: mlp(2, 48, 48, 48, 1, activation=nn.Tanh))
    return Problem(net, loss, of_step, evaluate)


TASKS = (
    Task("siren", "SIREN of a photograph", lower("mean square"), 1200, photograph),
    Task("fourier", "Fourier features, missing pixels", lower("mean square"), 1000,
         missing_pixels),
    Task("pinn", "PINN, heat equation", lower("relative error"), 1500, heat),
)  # fmt: skip
