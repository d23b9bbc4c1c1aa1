"""Convolutional networks that classify images, with norms and shortcuts, or restore them."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.base import Plan, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, Stream
from meta_train.families.images import FULL, HALF, Pictures
from meta_train.families.networks import ACTIVATIONS, SCHEMES, Activation, gains, initial
from meta_train.families.registry import LARGE, register_family

NORMS = ("", "group", "layer", "batch")


def norm_of(kind: str, channels: int) -> nn.Module:
    """Build a norm of feature maps, one of ``NORMS``; BatchNorm always uses batch statistics."""
    if kind == "batch":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if not kind:
        return nn.Identity()
    return nn.GroupNorm(2 if kind == "group" else 1, channels)


class Block(nn.Module):
    """Convolution, norm and activation; with a shortcut if shapes allow it.

    If depthwise, the convolution is depthwise separable.
    """

    def __init__(
        self,
        source: int,
        target: int,
        stride: int,
        norm: str,
        activation: Activation,
        shortcut: bool = False,
        depthwise: bool = False,
    ):
        super().__init__()
        groups = source if depthwise else 1
        first = source if depthwise else target
        self.conv = nn.Conv2d(source, first, 3, stride, padding=1, groups=groups)
        self.mix = nn.Conv2d(source, target, 1) if depthwise else nn.Identity()
        self.norm = norm_of(norm, target)
        self.activation = activation
        self.shortcut = shortcut and source == target and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, source, h, w] -> [B, target, h', w']."""
        y = self.activation(self.norm(self.mix(self.conv(x))))
        return x + y if self.shortcut else y


class ConvNet(nn.Module):
    """CNN of blocks, global pooling or, if flat, flattening, and a linear layer.

    If depthwise, all blocks but the first are; ``kind`` are further options of blocks.
    """

    def __init__(
        self,
        size: int,
        channels: Sequence[int],
        strides: Sequence[int],
        flat: bool = False,
        depthwise: bool = False,
        **kind,
    ):
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                Block(a, b, stride, depthwise=depthwise and i > 0, **kind)
                for i, ((a, b), stride) in enumerate(
                    zip(pairwise((1, *channels)), strides, strict=True)
                )
            )
        )
        for stride in strides:
            size = -(-size // stride)
        self.pool = nn.Identity() if flat else nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels[-1] * (size * size if flat else 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 1, size, size] -> [B, 10]."""
        return self.head(self.pool(self.blocks(x)).flatten(1))


@register_family("cnn")
def cnn(dice: Dice, pictures: Pictures) -> Plan:
    """CNNs with two or three blocks on 7 x 7 or 14 x 14 pixels."""
    size, blocks = dice.pick(7, 14), dice.integer(2, 3)
    shortcut, depthwise = dice.chance(0.3), dice.chance(0.25)
    # Norms of two groups need even numbers of channels.
    channels = [2 * dice.integer(2, 4) for _ in range(blocks)]
    if shortcut:
        channels = [channels[0]] * blocks
    strides = [2, *([1] * (blocks - 1) if size == 7 or shortcut else [2, 1][: blocks - 1])]
    norm, activation = dice.pick(*NORMS), dice.pick(*ACTIVATIONS)
    batch = dice.pick(8, 16, 32) if size == 7 else dice.pick(8, 16)
    flat, scheme = dice.chance(0.3), dice.pick(*SCHEMES)
    noise = dice.uniform(low=0.1, high=0.4) if dice.chance(0.2) else None
    module = ConvNet(
        size, channels, strides, flat, depthwise,
        norm=norm, activation=activation, shortcut=shortcut,
    )  # fmt: skip
    start = initial(module, dice, scheme, gains(dice))
    examples = Stream(dice, pictures.batches(batch, size, axes=3, noise=noise))
    return Plan(module, start, examples, F.cross_entropy)


@register_family("image_cnn", share=LARGE)
def image_cnn(dice: Dice, pictures: Pictures) -> Plan:
    """CNNs with three convolutions of 8 to 20 channels on 14 x 14 pixels, and global pooling."""
    width = 2 * dice.integer(4, 5)
    channels, strides = [width, 2 * width, 2 * width], ([2, 1, 1], [2, 2, 1])
    return convolutional(dice, pictures, HALF, channels, 0.4, strides)


@register_family("full_cnn", share=1 / 16)
def full_cnn(dice: Dice, pictures: Pictures) -> Plan:
    """CNNs with two to four convolutions of 8 to 32 channels on whole images."""
    width = 2 * dice.integer(4, 8)
    channels = [width, *[2 * width] * dice.integer(1, 3)]
    strides = [2, 2, 1, 1][: len(channels)]
    return convolutional(dice, pictures, FULL, channels, 0.3, (strides,))


def convolutional(
    dice: Dice, pictures: Pictures, size: int, channels: Sequence[int], normed: float,
    strides: Sequence[Sequence[int]],
) -> Plan:  # fmt: skip
    """Draw a CNN classifier, with batches of 64 or 128, and a norm with probability ``normed``."""
    norm = dice.pick(*NORMS) if dice.chance(normed) else ""
    activation, scheme = dice.pick(*ACTIVATIONS), dice.pick(*SCHEMES)
    batch = dice.pick(64, 128)
    chosen = dice.pick(*strides) if len(strides) > 1 else strides[0]
    module = ConvNet(size, channels, chosen, norm=norm, activation=activation)
    start = initial(module, dice, scheme, gains(dice))
    examples = Stream(dice, pictures.batches(batch, size, axes=3))
    return Plan(module, start, examples, F.cross_entropy)


class Restorer(nn.Module):
    """Residual denoiser: convolutions that keep the size of an image, added to the input."""

    def __init__(self, channels: list[int], activation: Activation):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise((1, *channels, 1))
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 1, size, size] -> [B, 1, size, size]."""
        h = x
        for conv in self.convs[:-1]:
            h = self.activation(conv(h))
        return x + self.convs[-1](h)


@register_family("restore", share=LARGE)
def restore(dice: Dice, pictures: Pictures) -> Plan:
    """Three to four convolutions that denoise images or fill holes in them."""
    channels = [2 * dice.integer(3, 6)] * dice.integer(2, 3)
    batch, holes, noise = dice.pick(16, 32), dice.chance(0.5), dice.number(0.3, 1.0)
    activation, scheme = dice.pick(*ACTIVATIONS), dice.pick(*SCHEMES)

    def make(dice: Dice) -> Batch:
        x = pictures.draw(dice, batch, HALF)[0][:, :, None]
        if holes:
            return x * (dice.uniform(*x.shape[1:]) < 0.5), x
        return x + noise * dice.normal(*x.shape[1:]), x

    module = Restorer(channels, activation)
    return Plan(module, initial(module, dice, scheme), Stream(dice, make), squared)
