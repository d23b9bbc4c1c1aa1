"""Networks that hold an image: pixel coordinates go in, grey values come out."""

from collections.abc import Sequence
from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from meta_train.families.base import Plan, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, FixedSet, Stream, rows
from meta_train.families.images import Pictures
from meta_train.families.initial import initial
from meta_train.families.networks import MLP
from meta_train.families.registry import register_family


def sines(dice: Dice, sizes: Sequence[int], omega: float) -> tuple[MLP, dict[str, Tensor]]:
    """Linear layers of these sizes with sin(omega x) in between, and their start.

    As published, section 3.2 of Sitzmann et al. 2020: inputs of each sine have a standard
    deviation of about 1.
    """
    module = MLP(sizes, lambda x: torch.sin(omega * x))
    start = initial(module, dice)
    for i, fan_in in enumerate(sizes[:-1]):
        bound = 1 / fan_in if i == 0 else sqrt(6 / fan_in) / omega
        # torch's own start, which these are drawn as, is within 1 / sqrt(fan-in).
        start[f"linear.{i}.weight"] *= bound * sqrt(fan_in)
    return module, start


def grid(size: int) -> Tensor:
    """Coordinates in [-1, 1] of all pixels, [size * size, 2]."""
    line = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)


@register_family("siren")
def siren(dice: Dice, pictures: Pictures) -> Plan:
    """Two or three layers of sines, or of ReLU on Fourier features; all pixels or some."""
    size, fourier = dice.pick(14, 28, 28), dice.chance(0.3)
    batch = dice.pick(64, 128, 256, 0)
    points = batch or size * size
    layers = dice.integer(1, 3 if points <= 128 else 2)
    wide = dice.integer(12, 32 if points <= 256 else 20)
    image, _ = pictures.draw(dice, 1, size)
    values = image.flatten(2).transpose(1, 2)
    places = grid(size).expand(dice.pairs, -1, -1)
    if fourier:
        # Tancik et al. 2020: frequencies are drawn once, and their deviation decides.
        frequencies = dice.normal(2, 12) * dice.log_uniform(1.0, 4.0)[:, None, None]
        places = torch.cat([f(pi * places @ frequencies) for f in (torch.sin, torch.cos)], -1)
        module = MLP([24, *[wide] * layers, 1], F.relu)
        start = initial(module, dice, "he")
    else:
        omega = dice.pick(10.0, 20.0, 30.0)
        module, start = sines(dice, [2, *[wide] * layers, 1], omega)

    def make(dice: Dice) -> Batch:
        index = dice.integers(size * size, batch)
        return rows(places, index), rows(values, index)

    examples = Stream(dice, make) if batch else FixedSet(dice, (places, values))
    return Plan(module, start, examples, squared)
