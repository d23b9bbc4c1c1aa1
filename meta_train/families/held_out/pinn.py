"""A network that is to solve u'' = f with u(-1) = u(1) = 0 (Raissi et al. 2019)."""

from math import pi
from typing import Any

import torch
from torch import Tensor

from meta_train.families.base import Batch, Plan
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import initial
from meta_train.families.networks import MLP, dashed
from meta_train.families.registry import register_family

WAVES = 3
ENDS = 10.0  # what boundary values weigh against equations


class Curvature(MLP):
    """A tanh network of one input, with its second derivative carried along."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1] -> [B, 2]: values and second derivatives."""
        layers: Any = self.linear  # torch says of none what it is
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
    """Squared errors of the equation, and of the values at both ends, the last two points."""
    value, bend = answer.unbind(-1)
    return (bend[:-2] - y[:-2]).square().mean() + ENDS * value[-2:].square().mean()


@register_family("pinn", held_out=True)
def pinn(dice: Dice, pictures: Pictures) -> Plan:
    """Right sides of three waves, points drawn anew at every step."""
    sizes, batch = [1, *[dice.integer(16, 24)] * dice.integer(1, 2), 1], dice.pick(32, 64)
    waves = torch.arange(1, WAVES + 1) * pi / 2
    heights = dice.normal(1, WAVES)

    def make(dice: Dice) -> Batch:
        x = dice.uniform(batch, 1, low=-1.0, high=1.0)
        ends = torch.tensor([[-1.0], [1.0]]).expand(dice.pairs, -1, -1)
        x = torch.cat([x, ends], 1)
        return x, (heights * torch.sin(waves * (x + 1))).sum(-1)

    module = Curvature(sizes, "tanh")
    return Plan(
        name=f"pinn {dashed(sizes)}, batches of {batch}",
        module=module,
        start=initial(module, dice, "xavier"),
        examples=Stream(dice, make),
        criterion=residual,
        twin=MLP(sizes, "tanh"),
    )
