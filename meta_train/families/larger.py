"""Networks that are far from done after a thousand steps: wider, on larger images and batches.

Small networks on small batches are soon as good as they get, and ask for short steps early. These
ask for the opposite. They cost as much as the others do with an eighth of the instances.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.attention import Transformer
from meta_train.families.base import Plan, next_tokens, squared
from meta_train.families.cnn import NORMS, ConvNet
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, Stream
from meta_train.families.images import FULL, Pictures
from meta_train.families.initial import SCHEMES, gains, initial, spread_tables
from meta_train.families.networks import ACTIVATIONS, MLP, Activation
from meta_train.families.recurrence import StepByStep, Twin
from meta_train.families.registry import register_family
from meta_train.families.tokens import one_hot, texts

SIZE = 14
SHARE = 0.125


@register_family("wide", share=SHARE)
def wide(dice: Dice, pictures: Pictures) -> Plan:
    """MLPs of 196 inputs and up to 72 neurons a layer, which classify or reproduce images."""
    reproduces = dice.chance(0.3)
    hidden = [dice.integer(32, 72) for _ in range(dice.integer(2, 3))]
    if reproduces:
        hidden[len(hidden) // 2] = dice.integer(8, 24)
    sizes = [SIZE * SIZE, *hidden, SIZE * SIZE if reproduces else 10]
    activation, norm = dice.pick(*ACTIVATIONS), dice.chance(0.2)
    batch, scheme = dice.pick(64, 128), dice.pick(*SCHEMES)
    images = pictures.batches(batch, SIZE)

    def make(dice: Dice) -> Batch:
        x, y = images(dice)
        return x, x if reproduces else y

    module = MLP(sizes, activation, norm)
    start = initial(module, dice, scheme, gains(dice))
    return Plan(module, start, Stream(dice, make), squared if reproduces else F.cross_entropy)


@register_family("image_cnn", share=SHARE)
def image_cnn(dice: Dice, pictures: Pictures) -> Plan:
    """Three convolutions of 8 to 20 channels on 14 x 14 pixels, pooled at the end."""
    width = 2 * dice.integer(4, 5)
    channels, strides = [width, 2 * width, 2 * width], ([2, 1, 1], [2, 2, 1])
    return convolutional(dice, pictures, SIZE, channels, 0.4, strides)


@register_family("full_cnn", share=SHARE / 2)
def full_cnn(dice: Dice, pictures: Pictures) -> Plan:
    """Two to four convolutions of 8 to 32 channels on whole images."""
    width = 2 * dice.integer(4, 8)
    channels = [width, *[2 * width] * dice.integer(1, 3)]
    strides = [2, 2, 1, 1][: len(channels)]
    return convolutional(dice, pictures, FULL, channels, 0.3, (strides,))


def convolutional(
    dice: Dice, pictures: Pictures, size: int, channels: Sequence[int], normed: float,
    strides: Sequence[Sequence[int]],
) -> Plan:  # fmt: skip
    """A CNN that classifies, in batches of 64 or 128, with a norm as often as ``normed`` says."""
    norm = dice.pick(*NORMS) if dice.chance(normed) else ""
    activation, scheme = dice.pick(*ACTIVATIONS), dice.pick(*SCHEMES)
    batch = dice.pick(64, 128)
    chosen = dice.pick(*strides) if len(strides) > 1 else strides[0]
    module = ConvNet(size, channels, chosen, norm=norm, activation=activation)
    start = initial(module, dice, scheme, gains(dice))
    examples = Stream(dice, pictures.batches(batch, size, axes=3))
    return Plan(module, start, examples, F.cross_entropy)


@register_family("patches", share=SHARE)
def patches(dice: Dice, pictures: Pictures) -> Plan:
    """Transformers of width 24 to 48 that classify whole images, cut into 16 patches."""
    width, layers = 8 * dice.integer(3, 6), dice.integer(1, 3)
    activation, batch = dice.pick(*ACTIVATIONS), dice.pick(32, 64)
    side, edge = FULL // 4, 4

    def make(dice: Dice) -> Batch:
        x, y = pictures.draw(dice, batch, FULL)
        tokens = x.unflatten(-2, (edge, side)).unflatten(-1, (edge, side)).transpose(-3, -2)
        return tokens.flatten(-2).flatten(-3, -2), y

    module = Transformer(
        nn.Linear(side**2, width), edge**2, width, layers, activation, 10, causal=False
    )
    start = spread_tables(initial(module, dice), module, dice.pick(0.02, 0.1))
    return Plan(module, start, Stream(dice, make), F.cross_entropy)


@register_family("language", share=SHARE)
def language(dice: Dice, pictures: Pictures) -> Plan:
    """Transformers, GRUs and LSTMs of width 24 to 64 that tell the next letter of made-up texts."""
    letters, length, batch = dice.integer(12, 32), dice.pick(16, 24), dice.pick(16, 32)
    windows = texts(dice, letters, length)
    kind = dice.pick("transformer", "transformer", "gru", "lstm")

    if kind == "transformer":
        width, layers = 8 * dice.integer(3, 6), dice.integer(1, 2)
        module: nn.Module = Transformer(
            nn.Embedding(letters, width), length, width, layers, dice.pick(*ACTIVATIONS), letters,
            causal=True, tied=dice.chance(0.4),
        )  # fmt: skip
        twin = None
        start = spread_tables(initial(module, dice), module, dice.pick(0.02, 0.1, 1.0))
    else:
        width = 8 * dice.integer(4, 8)
        shape = (letters, width, letters, True)
        module, twin = StepByStep(kind, *shape), Twin(kind, *shape)
        start = initial(module, dice)

    def make(dice: Dice) -> Batch:
        x, y = windows(dice, batch)
        return (x if kind == "transformer" else one_hot(x, letters)), y

    return Plan(module, start, Stream(dice, make), next_tokens, twin)


class Restorer(nn.Module):
    """Convolutions that keep the size of an image, the last one added to what was read."""

    def __init__(self, channels: list[int], activation: Activation):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise((1, *channels, 1))
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, size, size] -> the same."""
        h = x
        for conv in self.convs[:-1]:
            h = self.activation(conv(h))
        return x + self.convs[-1](h)


@register_family("restore", share=SHARE)
def restore(dice: Dice, pictures: Pictures) -> Plan:
    """Three to four convolutions that take noise out of images or fill holes in them."""
    channels = [2 * dice.integer(3, 6)] * dice.integer(2, 3)
    batch, holes, noise = dice.pick(16, 32), dice.chance(0.5), dice.number(0.3, 1.0)
    activation, scheme = dice.pick(*ACTIVATIONS), dice.pick(*SCHEMES)

    def make(dice: Dice) -> Batch:
        x = pictures.draw(dice, batch, SIZE)[0][:, :, None]
        if holes:
            return x * (dice.uniform(*x.shape[1:]) < 0.5), x
        return x + noise * dice.normal(*x.shape[1:]), x

    module = Restorer(channels, activation)
    return Plan(module, initial(module, dice, scheme), Stream(dice, make), squared)
