"""Functions to learn: numbers in, a number out, another one for each pair."""

from collections.abc import Callable
from math import pi, sqrt

import torch
from torch import Tensor

from meta_train.families.dice import Dice

Teacher = Callable[[Tensor], Tensor]  # [P, B, inputs] -> [P, B, 1], of about unit variance


def network(dice: Dice, inputs: int) -> Teacher:
    """A wide layer of tanh neurons."""
    hidden = 16
    first = dice.normal(inputs, hidden) * 1.5 / sqrt(inputs)
    bias, last = dice.normal(1, hidden) * 0.5, dice.normal(hidden, 1) * 2 / sqrt(hidden)
    return lambda x: torch.tanh(x @ first + bias) @ last


def friedman(dice: Dice, inputs: int) -> Teacher:
    """As Friedman's (1991) first, of five inputs or as many as there are: the rest mean nothing."""
    order = dice.orders(max(inputs, 5))[:, None] % inputs
    weights = dice.uniform(1, 4, low=0.5, high=1.5)

    def teach(x: Tensor) -> Tensor:
        a, b, c, d, e = (
            torch.sigmoid(x).gather(2, order[..., i : i + 1].expand(-1, x.shape[1], -1))
            for i in range(5)
        )
        terms = [2 * torch.sin(pi * a * b), 4 * (c - 0.5).square(), 2 * d, e]
        together = zip(terms, weights.split(1, -1), strict=True)
        return torch.stack([term * weight for term, weight in together]).sum(0) - 2

    return teach


def polynomial(dice: Dice, inputs: int) -> Teacher:
    """Linear terms and a few products."""
    linear = dice.normal(inputs, 1) / sqrt(inputs)
    left, right = (dice.normal(inputs, 3) / sqrt(inputs) for _ in range(2))
    return lambda x: x @ linear + 0.5 * ((x @ left) * (x @ right)).sum(-1, keepdim=True)


TEACHERS = {"tanh network": network, "Friedman": friedman, "polynomial": polynomial}
