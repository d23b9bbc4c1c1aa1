"""MLPs: that classify or reproduce images, and that learn functions."""

from collections.abc import Callable
from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from meta_train.families.base import Plan, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, Examples, FixedSet, Stream, noisy_labels
from meta_train.families.images import Pictures
from meta_train.families.initial import SCHEMES, gains, initial
from meta_train.families.networks import ACTIVATIONS, MLP
from meta_train.families.registry import register_family

BATCHES = (8, 16, 32, 64, 128)
JUDGES = 256  # examples to be judged by


@register_family("classifier")
def classifier(dice: Dice, pictures: Pictures) -> Plan:
    """One to three hidden layers, or four to six narrow ones; sometimes some wrong labels."""
    deep = dice.chance(0.3)
    if deep:
        hidden = [dice.integer(12, 24)] * dice.integer(4, 6)
    else:
        hidden = [dice.integer(12, 40) for _ in range(dice.integer(1, 3))]
    sizes, activation = [49, *hidden, 10], dice.pick(*ACTIVATIONS)
    norm, batch = dice.chance(0.2), dice.pick(*(BATCHES[:-1] if deep else BATCHES))
    noise: Tensor | None = dice.uniform(low=0.1, high=0.4) if dice.chance(0.3) else None
    module, scheme = MLP(sizes, activation, norm), dice.pick(*SCHEMES)
    # Signals of a deep network die at a gain that is low, and explode at one that is high.
    start = initial(module, dice, scheme, gains(dice))
    examples = Stream(dice, pictures.batches(batch, noise=noise))
    return Plan(module, start, examples, F.cross_entropy)


@register_family("autoencoder")
def autoencoder(dice: Dice, pictures: Pictures) -> Plan:
    """Squared error of standardised pixels or cross-entropy of pixels; sometimes denoising."""
    wide, code = dice.integer(16, 32), dice.integer(4, 12)
    sizes = [49, wide, code, wide, 49] if dice.chance(0.7) else [49, code, 49]
    activation, batch = dice.pick(*ACTIVATIONS), dice.pick(16, 32, 64, 128)
    raw, scheme = dice.chance(0.5), dice.pick(*SCHEMES)
    noise = dice.number(0.1, 0.5) if dice.chance(0.3) else 0.0

    def make(dice: Dice) -> Batch:
        x, _ = pictures.draw(dice, batch, raw=raw)
        x = x.flatten(2)
        return (x + noise * dice.normal(*x.shape[1:]) if noise else x), x

    module = MLP(sizes, activation)
    start = initial(module, dice, scheme, gains(dice))
    criterion = F.binary_cross_entropy_with_logits if raw else squared
    return Plan(module, start, Stream(dice, make), criterion)


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


TEACHERS = (network, friedman, polynomial)


def examples_of(
    dice: Dice, inputs: int, raw: bool, noises: tuple[float, ...]
) -> Callable[..., Batch]:
    """A function for each pair, as what draws examples of it.

    Args:
        dice: To draw the functions with.
        inputs: Number of inputs of a function.
        raw: Whether inputs and targets are in units of their own, targets often far from zero.
        noises: Of which one is the standard deviation of the noise, in that of the targets.

    Returns:
        (dice, count, clean) -> [P, count, inputs] and [P, count, 1].
    """
    kind, noise = dice.pick(*TEACHERS), dice.pick(*noises)
    teacher = kind(dice, inputs)
    columns = dice.log_uniform(0.1, 10.0, 1, inputs) if raw and dice.chance(0.7) else 1.0
    scale = dice.log_uniform(0.01, 100.0, 1, 1) if raw else 1.0
    offset = dice.normal(1, 1) * dice.pick(0.0, 0.0, 3.0) if raw else 0.0

    def make(dice: Dice, count: int, clean: bool = False) -> Batch:
        x = dice.normal(count, inputs)
        y = teacher(x) + offset
        if noise and not clean:
            y = y + noise * dice.normal(count, 1)
        return x * columns, y * scale

    return make


@register_family("regression")
def regression(dice: Dice, pictures: Pictures) -> Plan:
    """Functions with noise, in whatever units; new examples at every step, or some and judges."""
    inputs = dice.integer(2, 16)
    make = examples_of(dice, inputs, dice.chance(0.8), (0.0, 0.1, 0.3, 1.0))
    sizes = [inputs, *(dice.integer(16, 40) for _ in range(dice.integer(1, 3))), 1]
    activation, batch = dice.pick(*ACTIVATIONS), dice.pick(16, 32, 64, 128, 256)
    scheme, count = dice.pick(*SCHEMES), dice.pick(0, 256, 512 if batch < 128 else 256)
    module = MLP(sizes, activation)
    if count:
        fixed = make(dice.other("examples"), count)
        judges = make(dice.other("judges"), JUDGES, True)
        examples: Examples = FixedSet(dice, fixed, batch, judges)
    else:
        examples = Stream(dice, lambda dice: make(dice, batch))
    start = initial(module, dice, scheme, gains(dice))
    return Plan(module, start, examples, squared)


@register_family("few_examples")
def few_examples(dice: Dice, pictures: Pictures) -> Plan:
    """100 to 400 images or noisy numbers, and judges: who minimises the loss too well, loses."""
    count, batch = dice.integer(100, 400), dice.pick(16, 32, 64, 0)
    hidden = [dice.integer(16, 48) for _ in range(dice.integer(1, 2))]
    activation, scheme = dice.pick(*ACTIVATIONS), dice.pick(*SCHEMES)
    if dice.chance(0.5):
        sizes, criterion = [49, *hidden, 10], F.cross_entropy
        x, y = pictures.draw(dice.other("examples"), count, seen=True)
        judges_x, judges_y = pictures.draw(dice.other("judges"), JUDGES, seen=False)
        if dice.chance(0.4):
            y = noisy_labels(dice, y, dice.uniform(low=0.1, high=0.4))
        fixed, judges = (x.flatten(2), y), (judges_x.flatten(2), judges_y)
    else:
        inputs, criterion = dice.integer(4, 16), squared
        sizes = [inputs, *hidden, 1]
        make = examples_of(dice, inputs, dice.chance(0.5), (0.1, 0.3, 1.0))
        # Noise in what one is judged by would only hide differences.
        judges = make(dice.other("judges"), JUDGES, True)
        fixed = make(dice.other("examples"), count)
    module = MLP(sizes, activation)
    start = initial(module, dice, scheme, gains(dice))
    return Plan(module, start, FixedSet(dice, fixed, batch, judges), criterion)
