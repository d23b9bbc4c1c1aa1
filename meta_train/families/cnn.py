"""Small convolutional networks that classify images, with norms, shortcuts and depthwise ones."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.base import Plan
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import SCHEMES, gains, initial
from meta_train.families.networks import ACTIVATIONS, Activation
from meta_train.families.registry import register_family

NORMS = ("", "group", "layer", "batch")


def norm_of(kind: str, channels: int) -> nn.Module:
    """A norm of feature maps, one of ``NORMS``; BatchNorm always with the batch's statistics."""
    if kind == "batch":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if not kind:
        return nn.Identity()
    return nn.GroupNorm(2 if kind == "group" else 1, channels)


class Block(nn.Module):
    """Convolution, norm and activation; with a shortcut where shapes allow it.

    Args:
        source: Channels read.
        target: Channels written.
        stride: Stride of the convolution.
        norm: One of ``NORMS``.
        activation: What comes after the norm.
        shortcut: Whether what is read is added to what is written.
        depthwise: Whether each channel has a kernel of its own, and a 1 x 1 one mixes them.
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
        """[B, source, h, w] -> [B, target, h', w']."""
        y = self.activation(self.norm(self.mix(self.conv(x))))
        return x + y if self.shortcut else y


class ConvNet(nn.Module):
    """Blocks, global pooling or flattening, and a linear layer.

    Args:
        size: Size of the images.
        channels: After each block.
        strides: Strides of each block.
        flat: Whether pixels are flattened instead of pooled.
        depthwise: Whether all blocks but the first are.
        kind: What else blocks are built with.
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
        """[B, 1, size, size] -> [B, 10]."""
        return self.head(self.pool(self.blocks(x)).flatten(1))


@register_family("cnn")
def cnn(dice: Dice, pictures: Pictures) -> Plan:
    """Two or three blocks on 7 x 7 or 14 x 14 pixels."""
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
