"""Ill-conditioned linear problems."""

from itertools import pairwise
from math import sqrt

import torch
from torch import nn
from torch.nn import functional as F

from meta_train.families.base import Plan, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, FixedSet, Stream
from meta_train.families.images import Pictures
from meta_train.families.networks import initial
from meta_train.families.registry import register_family


@register_family("ill_posed")
def ill_posed(dice: Dice, pictures: Pictures) -> Plan:
    """Logistic regression, least squares or matrix factorisation."""
    return dice.pick(logistic, quadratic, factorisation)(dice)


def logistic(dice: Dice) -> Plan:
    """Draw a logistic regression with two to five classes, and columns scaled by 0.01 to 100."""
    inputs, classes = dice.integer(5, 30), dice.integer(2, 5)
    columns = dice.log_uniform(0.01, 100.0, 1, inputs)
    meaning, batch = 2 * dice.normal(inputs, classes) / sqrt(inputs), dice.pick(32, 128, 0)

    def make(dice: Dice, count: int) -> Batch:
        x = dice.normal(count, inputs)
        return x * columns, (x @ meaning + 0.5 * dice.normal(count, classes)).argmax(-1)

    stream = Stream(dice, lambda dice: make(dice, batch))
    examples = stream if batch else FixedSet(dice, make(dice.other("examples"), 256))
    module = nn.Sequential(nn.Linear(inputs, classes))
    start = initial(module, dice)
    if dice.chance(0.5):  # the usual start of such regressions
        start = {name: torch.zeros_like(p) for name, p in start.items()}
    return Plan(module, start, examples, F.cross_entropy)


def quadratic(dice: Dice) -> Plan:
    """Draw least squares with a condition number up to 10,000, in batches of all or half."""
    size = dice.integer(10, 60)
    condition = dice.log_uniform(10.0, 1e4)
    spectrum = condition[:, None] ** -torch.linspace(0, 0.5, size)  # the loss has its square
    left, right = (torch.linalg.qr(dice.normal(size, size))[0] for _ in range(2))
    x = sqrt(size) * (left * spectrum[:, None]) @ right
    y = x @ dice.normal(size, 1)
    batch = dice.pick(0, 0, size // 2)
    module = nn.Sequential(nn.Linear(size, 1, bias=False))
    return Plan(module, initial(module, dice), FixedSet(dice, (x, y), batch), squared)


def factorisation(dice: Dice) -> Plan:
    """Draw a factorisation of a matrix into two or three: linear layers on unit vectors."""
    high, wide, rank = dice.integer(16, 40), dice.integer(16, 40), dice.integer(2, 8)
    true = dice.integer(1, rank)
    falling = torch.arange(1, true + 1) ** -dice.number(0.0, 1.5)
    y = (dice.normal(high, true) * falling) @ dice.normal(true, wide) / sqrt(true)
    y = y + dice.pick(0.0, 0.1) * dice.normal(high, wide)
    sizes = [high, *[rank] * dice.integer(1, 2), wide]
    module = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))
    spread = dice.log_uniform(0.1, 1.0)
    x = torch.eye(high).expand(dice.pairs, -1, -1)
    start = {n: spread[:, None, None] * dice.normal(*p.shape) for n, p in module.named_parameters()}
    return Plan(module, start, FixedSet(dice, (x, y)), squared)
