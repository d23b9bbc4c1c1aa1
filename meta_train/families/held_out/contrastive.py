"""Two views of an image are to be near each other, and those of others far (InfoNCE)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from meta_train.families.base import Batch, Criterion, Plan
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import initial
from meta_train.families.networks import ACTIVATIONS, MLP, dashed
from meta_train.families.registry import register_family


def info_nce(temperature: float) -> Criterion:
    """The first half of the batch looks for its other views in the second half."""

    def criterion(answer: Tensor, y: Tensor) -> Tensor:
        one, other = F.normalize(answer, dim=-1, eps=1e-6).chunk(2)
        return F.cross_entropy(one @ other.T / temperature, y)

    return criterion


@register_family("contrastive", held_out=True)
def contrastive(dice: Dice, pictures: Pictures) -> Plan:
    """Views differ by noise and by brightness."""
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
    return Plan(
        name=f"contrastive {dashed(sizes)} {activation}, batches of {batch}",
        module=module,
        start=initial(module, dice),
        examples=Stream(dice, make),
        criterion=info_nce(temperature),
    )
