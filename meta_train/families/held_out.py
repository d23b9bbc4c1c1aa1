"""Held-out families, never used in meta-training, for comparing designs."""

from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.base import Criterion, Plan, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, Stream, rows
from meta_train.families.images import HALF, Pictures
from meta_train.families.networks import ACTIVATIONS, MLP, Activation, initial
from meta_train.families.registry import register_family


def info_nce(temperature: float) -> Criterion:
    """Build the InfoNCE loss between the two halves of a batch, which are two views of images."""

    def criterion(answer: Tensor, y: Tensor) -> Tensor:
        one, other = F.normalize(answer, dim=-1, eps=1e-6).chunk(2)
        return F.cross_entropy(one @ other.T / temperature, y)

    return criterion


@register_family("contrastive", held_out=True)
def contrastive(dice: Dice, pictures: Pictures) -> Plan:
    """Contrastive learning: two views of an image differ in noise and contrast."""
    sizes, activation = [49, dice.integer(16, 32), dice.integer(6, 12)], dice.pick(*ACTIVATIONS)
    batch, temperature, noise = dice.pick(16, 32), dice.number(0.1, 0.5), dice.number(0.3, 1.0)

    def view(dice: Dice, x: Tensor) -> Tensor:
        contrast = dice.uniform(batch, 1, low=0.5, high=1.5)
        return contrast * x + noise * dice.normal(batch, 49)

    def make(dice: Dice) -> Batch:
        x = pictures.draw(dice, batch)[0].flatten(2)
        views = torch.cat([view(dice, x), view(dice, x)], 1)
        return views, torch.arange(batch).expand(dice.pairs, -1)

    module = MLP(sizes, activation)
    return Plan(module, initial(module, dice), Stream(dice, make), info_nce(temperature))


class DenseLinks(nn.Module):
    """DenseNet-like MLP (Huang 2017): layers read all before them and add ``growth`` neurons."""

    def __init__(self, growth: int, layers: int, activation: Activation):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(49 + i * growth, growth) for i in range(layers))
        self.head = nn.Linear(49 + layers * growth, 10)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, pixels] -> [B, classes]."""
        for linear in self.linear:
            x = torch.cat([x, self.activation(linear(x))], -1)
        return self.head(x)


@register_family("dense_links", held_out=True)
def dense_links(dice: Dice, pictures: Pictures) -> Plan:
    """DenseNet-like MLPs with two to four layers of 8 to 12 neurons."""
    growth, layers, batch = dice.integer(8, 12), dice.integer(2, 4), dice.pick(16, 32, 64)
    activation = dice.pick(*ACTIVATIONS)
    module = DenseLinks(growth, layers, activation)
    examples = Stream(dice, pictures.batches(batch))
    return Plan(module, initial(module, dice), examples, F.cross_entropy)


class Gated(nn.Module):
    """Residual network of gated layers, silu(gate) times value (GLU: Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, layers: int):
        super().__init__()
        self.embed = nn.Linear(49, width)
        self.gates = nn.ModuleList(nn.Linear(width, hidden) for _ in range(layers))
        self.values = nn.ModuleList(nn.Linear(width, hidden) for _ in range(layers))
        self.back = nn.ModuleList(nn.Linear(hidden, width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, pixels] -> [B, classes]."""
        x = self.embed(x)
        for gate, value, back in zip(self.gates, self.values, self.back, strict=True):
            x = x + back(F.silu(gate(x)) * value(x))
        return self.head(x)


@register_family("gated", held_out=True)
def gated(dice: Dice, pictures: Pictures) -> Plan:
    """Gated networks with one to three layers, without norms."""
    width, hidden, layers = dice.integer(12, 20), dice.integer(16, 24), dice.integer(1, 3)
    batch = dice.pick(16, 32, 64)
    module = Gated(width, hidden, layers)
    examples = Stream(dice, pictures.batches(batch))
    return Plan(module, initial(module, dice), examples, F.cross_entropy)


CANDIDATES = 4  # number of images drawn for each image of a batch


@register_family("imbalance", held_out=True)
def imbalance(dice: Dice, pictures: Pictures) -> Plan:
    """Softmax regression on 49 or 196 pixels, with up to a hundredfold class imbalance."""
    size, batch = dice.pick(7, 14), dice.pick(16, 32)
    share = dice.log_uniform(0.01, 1.0, 10)

    def make(dice: Dice) -> Batch:
        x, y = pictures.draw(dice, CANDIDATES * batch, size)
        # Exponential clocks: the smallest are a weighted sample without replacement.
        clock = -dice.uniform(CANDIDATES * batch).clamp(min=1e-12).log() / share.gather(1, y)
        taken = clock.topk(batch, 1, largest=False).indices
        return rows(x.flatten(2), taken), rows(y, taken)

    module = nn.Sequential(nn.Linear(size * size, 10))
    start = {name: torch.zeros_like(p) for name, p in initial(module, dice).items()}
    return Plan(module, start, Stream(dice, make), F.cross_entropy)


ROWS = 7


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin 2021): pre-norm residual MLPs across rows and across channels."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.embed = nn.Linear(7, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.rows = nn.ModuleList(MLP([ROWS, 12, ROWS], F.gelu) for _ in range(layers))
        self.channels = nn.ModuleList(MLP([width, 24, width], F.gelu) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, rows, pixels] -> [B, classes]."""
        x = self.embed(x)
        for i, (across, channels) in enumerate(zip(self.rows, self.channels, strict=True)):
            x = x + across(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x).mean(1))


@register_family("mixer", held_out=True)
def mixer(dice: Dice, pictures: Pictures) -> Plan:
    """MLP-Mixers with one or two layers on rows of 7 x 7 pixels."""
    width, layers, batch = dice.integer(8, 16), dice.integer(1, 2), dice.pick(8, 12)
    module = Mixer(width, layers)
    examples = Stream(dice, pictures.batches(batch, axes=2))
    return Plan(module, initial(module, dice), examples, F.cross_entropy)


WAVES = 3
ENDS = 10.0  # weight of boundary values relative to the equation


class Curvature(MLP):
    """Tanh network of one input that also computes its second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 1] -> [B, 2]: values and second derivatives."""
        layers: Any = self.linear  # torch does not annotate the type of the layers
        first, *others = layers
        value, slope, bend = first(x), first.weight.T, torch.zeros(())
        for linear in others:
            h = torch.tanh(value)
            steep = 1 - h * h
            bend = steep * bend - 2 * h * steep * slope * slope
            slope = steep * slope
            value, slope, bend = linear(h), slope @ linear.weight.T, bend @ linear.weight.T
        return torch.cat([value, bend], -1)


def residual(answer: Tensor, y: Tensor) -> Tensor:
    """Compute squared errors of the equation, and of the values at both ends, the last points."""
    value, bend = answer.unbind(-1)
    return (bend[:-2] - y[:-2]).square().mean() + ENDS * value[-2:].square().mean()


@register_family("pinn", held_out=True)
def pinn(dice: Dice, pictures: Pictures) -> Plan:
    """PINNs for u'' = f with u(-1) = u(1) = 0 and f of three sines (Raissi et al. 2019)."""
    sizes, batch = [1, *[dice.integer(16, 24)] * dice.integer(1, 2), 1], dice.pick(32, 64)
    waves = torch.arange(1, WAVES + 1) * pi / 2
    heights = dice.normal(1, WAVES)

    def make(dice: Dice) -> Batch:
        x = dice.uniform(batch, 1, low=-1.0, high=1.0)
        ends = torch.tensor([[-1.0], [1.0]]).expand(dice.pairs, -1, -1)
        x = torch.cat([x, ends], 1)
        return x, (heights * torch.sin(waves * (x + 1))).sum(-1)

    module, twin = Curvature(sizes, torch.tanh), MLP(sizes, torch.tanh)
    start = initial(module, dice, "xavier")
    return Plan(module, start, Stream(dice, make), residual, twin)


class UNet(nn.Module):
    """U-Net with two levels and nearest-neighbour upsampling (Ronneberger et al. 2015)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.on = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.out = nn.Conv2d(3 * channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 1, size, size] -> [B, 1, size, size]."""
        fine = F.relu(self.first(x))
        coarse = F.relu(self.on(F.relu(self.down(fine))))
        up = F.interpolate(coarse, scale_factor=2, mode="nearest")
        return self.out(torch.cat([fine, up], 1))


@register_family("unet", held_out=True)
def unet(dice: Dice, pictures: Pictures) -> Plan:
    """U-Nets that denoise images of 14 x 14 pixels."""
    channels, batch, noise = dice.integer(2, 4), 2, dice.number(0.5, 1.0)

    def make(dice: Dice) -> Batch:
        x = pictures.draw(dice, batch, HALF)[0][:, :, None]
        return x + noise * dice.normal(*x.shape[1:]), x

    module = UNet(channels)
    return Plan(module, initial(module, dice), Stream(dice, make), squared)


class Variational(nn.Module):
    """Variational autoencoder: pixels and noise -> logits of pixels, means and log variances."""

    def __init__(self, hidden: int, code: int, activation: Activation):
        super().__init__()
        self.encoder = MLP([49, hidden, 2 * code], activation)
        self.decoder = MLP([code, hidden, 49], activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, pixels + code] -> [B, pixels + 2 code]."""
        pixels, noise = x[:, :49], x[:, 49:]
        code = self.encoder(pixels)
        mean, log_variance = code.chunk(2, -1)
        return torch.cat([self.decoder(mean + noise * (0.5 * log_variance).exp()), code], -1)


def bound(answer: Tensor, y: Tensor) -> Tensor:
    """Compute the negative evidence lower bound, in nats per pixel (Kingma and Welling 2014)."""
    mean, log_variance = answer[:, 49:].chunk(2, -1)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
    return F.binary_cross_entropy_with_logits(answer[:, :49], y) + divergence / 49


@register_family("variational", held_out=True)
def variational(dice: Dice, pictures: Pictures) -> Plan:
    """Variational autoencoders with codes of two to six numbers."""
    hidden, code, batch = dice.integer(16, 28), dice.integer(2, 6), dice.pick(16, 32, 64)
    activation = dice.pick(*ACTIVATIONS)

    def make(dice: Dice) -> Batch:
        x = pictures.draw(dice, batch, raw=True)[0].flatten(2)
        return torch.cat([x, dice.normal(batch, code)], -1), x

    module = Variational(hidden, code, activation)
    return Plan(module, initial(module, dice), Stream(dice, make), bound)
