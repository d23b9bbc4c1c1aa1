"""Layers that read all before them, side by side, as in DenseNet (Huang et al. 2017)."""

import torch
from torch import Tensor, nn

from meta_train.families.base import Batch, Plan
from meta_train.families.criteria import cross_entropy
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import initial
from meta_train.families.networks import ACTIVATIONS
from meta_train.families.registry import register_family


class DenseLinks(nn.Module):
    """Each layer adds ``growth`` neurons to what the next ones read."""

    def __init__(self, growth: int, layers: int, activation: str):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(49 + i * growth, growth) for i in range(layers))
        self.head = nn.Linear(49 + layers * growth, 10)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, pixels] -> [B, classes]."""
        for linear in self.linear:
            x = torch.cat([x, self.activation(linear(x))], -1)
        return self.head(x)


@register_family("dense_links", held_out=True)
def dense_links(dice: Dice, pictures: Pictures) -> Plan:
    """Two to four layers of 8 to 12 neurons."""
    growth, layers, batch = dice.integer(8, 12), dice.integer(2, 4), dice.pick(16, 32, 64)
    activation = dice.pick(*ACTIVATIONS)

    def make(dice: Dice) -> Batch:
        x, y = pictures.draw(dice, batch)
        return x.flatten(2), y

    module = DenseLinks(growth, layers, activation)
    return Plan(
        name=f"dense_links, {layers} layers of {growth} {activation}, batches of {batch}",
        module=module,
        start=initial(module, dice),
        examples=Stream(dice, make),
        criterion=cross_entropy,
    )
