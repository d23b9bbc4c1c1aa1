"""Softmax regression on images of classes of which some are a hundred times as rare."""

import torch
from torch import nn

from meta_train.families.base import Batch, Plan
from meta_train.families.criteria import cross_entropy
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream, rows
from meta_train.families.images import Pictures
from meta_train.families.initial import initial
from meta_train.families.registry import register_family

CANDIDATES = 4  # images drawn for each that is taken


@register_family("imbalance", held_out=True)
def imbalance(dice: Dice, pictures: Pictures) -> Plan:
    """Shares of classes are log-uniform; 49 or 196 pixels."""
    size, batch = dice.pick(7, 14), dice.pick(16, 32)
    share = dice.log_uniform(0.01, 1.0, 10)

    def make(dice: Dice) -> Batch:
        x, y = pictures.draw(dice, CANDIDATES * batch, size)
        # Exponential clocks: the first to ring are a draw without replacement by shares.
        clock = -dice.uniform(CANDIDATES * batch).clamp(min=1e-12).log() / share.gather(1, y)
        taken = clock.topk(batch, 1, largest=False).indices
        return rows(x.flatten(2), taken), rows(y, taken)

    module = nn.Sequential(nn.Linear(size * size, 10))
    start = {name: torch.zeros_like(p) for name, p in initial(module, dice).items()}
    return Plan(
        name=f"imbalance, softmax regression of {size} x {size}, rare classes, batches of {batch}",
        module=module,
        start=start,
        examples=Stream(dice, make),
        criterion=cross_entropy,
    )
