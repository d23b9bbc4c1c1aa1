"""MLPs: classifiers, autoencoders, implicit representations of images, and regression."""

from collections.abc import Callable, Sequence
from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from meta_train.families.base import Plan, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, Examples, FixedSet, Stream, noisy_labels, rows
from meta_train.families.images import HALF, Pictures
from meta_train.families.networks import ACTIVATIONS, MLP, SCHEMES, gains, initial
from meta_train.families.registry import LARGE, register_family

BATCHES = (8, 16, 32, 64, 128)
NUM_HELD_OUT = 256  # number of held-out examples


@register_family("classifier")
def classifier(dice: Dice, pictures: Pictures) -> Plan:
    """Classifiers with one to three hidden layers, or four to six narrow ones; some label noise."""
    deep = dice.chance(0.3)
    if deep:
        hidden = [dice.integer(12, 24)] * dice.integer(4, 6)
    else:
        hidden = [dice.integer(12, 40) for _ in range(dice.integer(1, 3))]
    sizes, activation = [49, *hidden, 10], dice.pick(*ACTIVATIONS)
    norm, batch = dice.chance(0.2), dice.pick(*(BATCHES[:-1] if deep else BATCHES))
    noise: Tensor | None = dice.uniform(low=0.1, high=0.4) if dice.chance(0.3) else None
    module, scheme = MLP(sizes, activation, norm), dice.pick(*SCHEMES)
    # Signals of a deep network vanish if the gain is low, and explode if it is high.
    start = initial(module, dice, scheme, gains(dice))
    examples = Stream(dice, pictures.batches(batch, noise=noise))
    return Plan(module, start, examples, F.cross_entropy)


@register_family("autoencoder")
def autoencoder(dice: Dice, pictures: Pictures) -> Plan:
    """Autoencoders with squared error or cross-entropy of pixels; sometimes denoising."""
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


@register_family("wide", share=LARGE)
def wide(dice: Dice, pictures: Pictures) -> Plan:
    """Classifiers or autoencoders with 196 inputs and up to 72 neurons per layer."""
    reproduces = dice.chance(0.3)
    hidden = [dice.integer(32, 72) for _ in range(dice.integer(2, 3))]
    if reproduces:
        hidden[len(hidden) // 2] = dice.integer(8, 24)
    sizes = [HALF * HALF, *hidden, HALF * HALF if reproduces else 10]
    activation, norm = dice.pick(*ACTIVATIONS), dice.chance(0.2)
    batch, scheme = dice.pick(64, 128), dice.pick(*SCHEMES)
    images = pictures.batches(batch, HALF)

    def make(dice: Dice) -> Batch:
        x, y = images(dice)
        return x, x if reproduces else y

    module = MLP(sizes, activation, norm)
    start = initial(module, dice, scheme, gains(dice))
    return Plan(module, start, Stream(dice, make), squared if reproduces else F.cross_entropy)


Teacher = Callable[[Tensor], Tensor]  # [P, B, inputs] -> [P, B, 1], of about unit variance


def network(dice: Dice, inputs: int) -> Teacher:
    """Draw a network with a wide layer of tanh neurons."""
    hidden = 16
    first = dice.normal(inputs, hidden) * 1.5 / sqrt(inputs)
    bias, last = dice.normal(1, hidden) * 0.5, dice.normal(hidden, 1) * 2 / sqrt(hidden)
    return lambda x: torch.tanh(x @ first + bias) @ last


def friedman(dice: Dice, inputs: int) -> Teacher:
    """Draw a variant of Friedman's (1991) first function; it depends on at most five inputs."""
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
    """Draw a polynomial with linear terms and a few products."""
    linear = dice.normal(inputs, 1) / sqrt(inputs)
    left, right = (dice.normal(inputs, 3) / sqrt(inputs) for _ in range(2))
    return lambda x: x @ linear + 0.5 * ((x @ left) * (x @ right)).sum(-1, keepdim=True)


TEACHERS = (network, friedman, polynomial)


def examples_of(
    dice: Dice, inputs: int, raw: bool, noises: tuple[float, ...]
) -> Callable[..., Batch]:
    """Draw a function for each pair; return (dice, count, clean) -> [P, count, inputs], targets.

    Targets are [P, count, 1]. If raw, inputs and targets have arbitrary units, and targets are
    often far from zero. One of the ``noises`` is the standard deviation of the noise relative to
    that of the targets.
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
    """Regression with noise, in any units; always new examples, or a fixed set."""
    inputs = dice.integer(2, 16)
    make = examples_of(dice, inputs, dice.chance(0.8), (0.0, 0.1, 0.3, 1.0))
    sizes = [inputs, *(dice.integer(16, 40) for _ in range(dice.integer(1, 3))), 1]
    activation, batch = dice.pick(*ACTIVATIONS), dice.pick(16, 32, 64, 128, 256)
    scheme, count = dice.pick(*SCHEMES), dice.pick(0, 256, 512 if batch < 128 else 256)
    module = MLP(sizes, activation)
    if count:
        fixed = make(dice.other("examples"), count)
        held_out = make(dice.other("judges"), NUM_HELD_OUT, True)
        examples: Examples = FixedSet(dice, fixed, batch, held_out)
    else:
        examples = Stream(dice, lambda dice: make(dice, batch))
    start = initial(module, dice, scheme, gains(dice))
    return Plan(module, start, examples, squared)


@register_family("few_examples")
def few_examples(dice: Dice, pictures: Pictures) -> Plan:
    """Training on 100 to 400 images or noisy numbers, with held-out examples: overfitting costs."""
    count, batch = dice.integer(100, 400), dice.pick(16, 32, 64, 0)
    hidden = [dice.integer(16, 48) for _ in range(dice.integer(1, 2))]
    activation, scheme = dice.pick(*ACTIVATIONS), dice.pick(*SCHEMES)
    if dice.chance(0.5):
        sizes, criterion = [49, *hidden, 10], F.cross_entropy
        x, y = pictures.draw(dice.other("examples"), count, seen=True)
        held_x, held_y = pictures.draw(dice.other("judges"), NUM_HELD_OUT, seen=False)
        if dice.chance(0.4):
            y = noisy_labels(dice, y, dice.uniform(low=0.1, high=0.4))
        fixed, held_out = (x.flatten(2), y), (held_x.flatten(2), held_y)
    else:
        inputs, criterion = dice.integer(4, 16), squared
        sizes = [inputs, *hidden, 1]
        make = examples_of(dice, inputs, dice.chance(0.5), (0.1, 0.3, 1.0))
        # Noise in held-out examples would only hide differences.
        held_out = make(dice.other("judges"), NUM_HELD_OUT, True)
        fixed = make(dice.other("examples"), count)
    module = MLP(sizes, activation)
    start = initial(module, dice, scheme, gains(dice))
    return Plan(module, start, FixedSet(dice, fixed, batch, held_out), criterion)


def sines(dice: Dice, sizes: Sequence[int], omega: float) -> tuple[MLP, dict[str, Tensor]]:
    """Build a SIREN of these sizes, and its initial weights.

    Initialised as in Sitzmann et al. 2020, section 3.2: inputs of each sine have a standard
    deviation of about 1.
    """
    module = MLP(sizes, lambda x: torch.sin(omega * x))
    start = initial(module, dice)
    for i, fan_in in enumerate(sizes[:-1]):
        bound = 1 / fan_in if i == 0 else sqrt(6 / fan_in) / omega
        # They are drawn by torch's own initialisation, which is within 1 / sqrt(fan-in).
        start[f"linear.{i}.weight"] *= bound * sqrt(fan_in)
    return module, start


def grid(size: int) -> Tensor:
    """Compute coordinates in [-1, 1] of all pixels, [size * size, 2]."""
    line = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)


@register_family("siren")
def siren(dice: Dice, pictures: Pictures) -> Plan:
    """SIRENs, or ReLU networks on Fourier features, with full or mini-batches of pixels."""
    size, fourier = dice.pick(14, 28, 28), dice.chance(0.3)
    batch = dice.pick(64, 128, 256, 0)
    points = batch or size * size
    layers = dice.integer(1, 3 if points <= 128 else 2)
    wide = dice.integer(12, 32 if points <= 256 else 20)
    image, _ = pictures.draw(dice, 1, size)
    values = image.flatten(2).transpose(1, 2)
    places = grid(size).expand(dice.pairs, -1, -1)
    if fourier:
        # Tancik et al. 2020: frequencies are drawn once; their standard deviation matters.
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
