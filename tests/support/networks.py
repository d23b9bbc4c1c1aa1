"""Small networks of every kind that people train, each with a batch and a loss."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.resnet import BasicBlock, ResNet

from l2o_graph.datasets.images import load_images

TEXT = b"what is neither in the weights nor in the gradient was never there to be learned; "


@dataclass(frozen=True)
class Case:
    """A network to be made, and what to feed it.

    Attributes:
        make: The network.
        batch: Its inputs and targets.
        loss: Of outputs and targets.
        orbits: For some sets of neurons, by a part of their name, into how many classes of
            interchangeable neurons they fall.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Tensor], Tensor]
    orbits: dict[str, int]


def images(channels: int = 1, size: int = 28, count: int = 32) -> tuple[Tensor, Tensor]:
    """FashionMNIST, scaled down."""
    data = load_images("fmnist_sample", None)
    x = data.normalise(data.train_x[:count])
    x = F.interpolate(x, (size, size)).repeat(1, channels, 1, 1)
    return x, data.train_y[:count] % 5


def text(length: int = 6, count: int = 16) -> tuple[Tensor, Tensor]:
    """Letters and the letters after them."""
    codes = torch.tensor([c % 11 for c in TEXT])
    rows = torch.stack([codes[i : i + length + 1] for i in range(count)])
    return rows[:, :-1], rows[:, 1:]


def pixels() -> tuple[Tensor, Tensor]:
    """Coordinates of an image, and its grey values."""
    image = images(size=8, count=1)[0][0, 0]
    axis = torch.linspace(-1, 1, 8)
    return torch.cartesian_prod(axis, axis), image.reshape(-1, 1)


def outlines() -> tuple[Tensor, Tensor]:
    """Images, and where they are bright."""
    x, _ = images(size=8)
    return x, (x[:, 0] > 0).long()


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def entropy_of_sequence(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Attention(nn.Module):
    """Attention with a projection each for queries, keys, values and outputs."""

    def __init__(self, size: int, heads: int, fused: bool, by_hand: bool):
        super().__init__()
        self.heads, self.by_hand = heads, by_hand
        if fused:
            self.qkv = nn.Linear(size, 3 * size)
        else:
            self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))
        self.o = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        three = (
            self.qkv(x).chunk(3, -1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
        )
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in three)
        if self.by_hand:
            scores = q @ k.transpose(-2, -1) / (size // self.heads) ** 0.5
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            y = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, size))


class GPT(nn.Module):
    """A decoder of one block; words and logits share a table."""

    def __init__(self, size: int = 8, heads: int = 2, words: int = 11, fused=True, by_hand=False):
        super().__init__()
        self.word, self.place = nn.Embedding(words, size), nn.Embedding(6, size)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(size) for _ in range(3))
        self.attention = Attention(size, heads, fused, by_hand)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.head = nn.Linear(size, words, bias=False)
        self.head.weight = self.word.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word(tokens) + self.place(torch.arange(tokens.shape[1]))
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x))


class Encoder(nn.Module):
    """torch's own attention, between two linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 5)
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)
        self.norm = nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x[:, 0])  # rows of an image are tokens
        return self.last(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    """A language model of recurrent layers."""

    def __init__(self, kind: Callable[..., nn.Module], **options):
        super().__init__()
        self.word = nn.Embedding(11, 6)
        self.layers = kind(6, 5, 2, batch_first=True, **options)
        width = options.get("proj_size", 5) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.word(tokens))[0])


class Cells(nn.Module):
    """A recurrent cell, step by step over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 5)
        for row in x[:, 0].unbind(1):
            state = self.cell(row, state)
        return self.head(state)


class UNet(nn.Module):
    """Down, up and a concatenation in between."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 2, 2)
        self.join, self.out = nn.Conv2d(9, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.down1(x).relu()
        deep = self.middle(self.down2(F.max_pool2d(wide, 2)).relu()).relu()
        return self.out(self.join(torch.cat([wide, self.up(deep)], 1)).relu())


class Mixer(nn.Module):
    """Layers that mix patches, and layers that mix channels."""

    def __init__(self, size: int = 6, patches: int = 16):
        super().__init__()
        self.patch = nn.Conv2d(1, size, 2, 2)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(size) for _ in range(3))
        self.mix1, self.mix2 = nn.Linear(patches, 7), nn.Linear(7, patches)
        self.up, self.down = nn.Linear(size, 9), nn.Linear(9, size)
        self.head = nn.Linear(size, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = x + self.mix2(F.gelu(self.mix1(self.norm1(x).mT))).mT
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x).mean(1))


class Siren(nn.Module):
    """An image as a function of its coordinates."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(5 * layer(x))
        return self.layers[-1](x)


class Gated(nn.Module):
    """Squeeze and excitation, written out, on grouped and depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.out = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.grouped(self.first(x).relu())))
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return self.out((x * gate[:, :, None, None]).flatten(1))


class Widening(nn.Module):
    """Residual additions between unequal widths: the narrow one is padded with zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.second(x) + F.pad(x, (0, 0, 0, 0, 0, 2))
        return self.head(x.relu().mean((2, 3)))


class ChannelsLast(nn.Module):
    """Flattened with the pixels outside, and the channels shuffled before."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 6, 3, stride=3), nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)
        return self.last(x.permute(0, 2, 3, 1).flatten(1))


def vit() -> nn.Module:
    return VisionTransformer(8, 4, 1, 2, 8, 12, dropout=0.0, num_classes=5)


def resnet() -> nn.Module:
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    # Its own widths are 64 to 512: the same blocks, narrow.
    net.conv1, net.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    net.layer1 = BasicBlock(4, 4)
    shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    net.layer2 = BasicBlock(4, 6, 2, shortcut)
    net.layer3, net.layer4, net.fc = nn.Identity(), nn.Identity(), nn.Linear(6, 5)
    return net


def mobilenet() -> nn.Module:
    row = functools.partial(InvertedResidualConfig, width_mult=0.1)
    rows = [row(16, 3, 32, 24, True, "RE", 2, 1), row(24, 5, 72, 24, True, "HS", 1, 1)]
    return MobileNetV3(rows, last_channel=10, num_classes=5, dropout=0.0)


def normalised() -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        norm(nn.Conv2d(1, 4, 3)), nn.PReLU(4), norm(nn.Conv2d(4, 6, 3)), nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )  # fmt: skip


small = functools.partial(images, size=8)
colour = functools.partial(images, channels=3, size=16)


def decoder() -> nn.Module:
    """A vector, of pixels that a norm scales, that becomes a map."""
    return nn.Sequential(
        nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 54), nn.ReLU(), nn.Unflatten(1, (6, 3, 3)),
        nn.Upsample(scale_factor=2), nn.ConvTranspose2d(6, 4, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


class Points(nn.Module):
    """Kernels around points, of pixels that are shifted and scaled, and waves of their mean."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64))
        self.far, self.near = nn.Parameter(torch.randn(6, 64)), nn.Parameter(torch.randn(7, 64))
        self.width, self.wave = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.randn(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        waves = (x.mean(1, keepdim=True) * self.wave).sin()
        near = (x[:, None] - self.near).square().mean(-1)
        far = torch.cdist((x - self.shift) * self.scale, self.far) * self.width.exp()
        return self.head(torch.cat([waves, near.neg().exp(), far.neg().exp()], 1))


NETWORKS = {
    "resnet": Case(resnet, colour, entropy, {"conv1": 1, "layer2.conv1": 1, "layer2.conv2": 1}),
    "mobilenet_v3": Case(mobilenet, colour, entropy, {"features.0.0": 1, "classifier.0": 1}),
    "vit": Case(vit, functools.partial(images, 3, 8), entropy, {"conv_proj": 1, "sum 2": 1}),
    "gpt": Case(GPT, text, entropy_of_sequence, {"place": 1, "attention.qkv": 3, "sum 2": 1}),
    "gpt, apart": Case(
        functools.partial(GPT, fused=False, by_hand=True), text, entropy_of_sequence,
        {"place": 1, "attention.q": 1, "attention.k": 1, "attention.v": 1},
    ),
    "encoder": Case(Encoder, small, entropy, {"first": 1, "attention": 3, "sum 2": 1}),
    "lstm": Case(
        functools.partial(Recurrent, nn.LSTM), text, entropy_of_sequence, {"layers_l0": 1}
    ),
    "gru, both ways": Case(
        functools.partial(Recurrent, nn.GRU, bidirectional=True), text, entropy_of_sequence,
        {"layers_l1": 1, "layers_l1_reverse": 1},
    ),
    "lstm, projected": Case(
        functools.partial(Recurrent, nn.LSTM, proj_size=3), text, entropy_of_sequence,
        {"layers_l0": 1, "layers_l0 projected": 1},
    ),
    "cells": Case(Cells, small, entropy, {"cell": 1}),
    "unet": Case(UNet, outlines, entropy, {"down1": 1, "up": 1, "concatenation 1": 2}),
    "mixer": Case(Mixer, small, entropy, {"patch": 1, "mix1": 1, "up": 1}),
    "siren": Case(Siren, pixels, F.mse_loss, {"layers.0": 1, "layers.1": 1}),
    "gated": Case(Gated, small, entropy, {"first": 1, "grouped": 1, "squeeze": 1}),
    "widening": Case(Widening, small, entropy, {"first": 1, "second": 2}),
    "channels last": Case(ChannelsLast, small, entropy, {"first": 1}),
    "decoder": Case(decoder, small, entropy, {"2": 9, "map 1": 1, "6": 1}),
    "points": Case(Points, small, entropy, {"far": 1, "near": 1, "wave": 1}),
    "weight norm": Case(normalised, small, entropy, {"0.parametrizations.weight": 1}),
}  # fmt: skip
