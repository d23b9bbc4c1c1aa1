"""Transformers that classify images from rows or patches, or predict sequences."""

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.base import Plan, next_tokens
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, Stream
from meta_train.families.images import FULL, Pictures
from meta_train.families.networks import ACTIVATIONS, MLP, Activation, initial, spread_tables
from meta_train.families.registry import LARGE, register_family
from meta_train.families.tokens import SEQUENCES

HEADS = 2


class Attention(nn.Module):
    """Self-attention with two heads, optionally causal."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] -> [B, T, width]."""
        # [B, T, 3 width] -> three of [B, heads, T, width of a head]
        parts = self.inward(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        # [B, heads, keys, queries]: a softmax over another axis than the last takes a third.
        score = key @ (query / sqrt(query.shape[-1])).transpose(-1, -2)
        if self.causal:
            later = torch.ones(score.shape[-2:], dtype=torch.bool).tril(-1)
            score = score.masked_fill(later, -1e9)
        read = score.softmax(-2).transpose(-1, -2) @ value
        return self.outward(read.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm transformer layer: attention and an MLP."""

    def __init__(self, width: int, activation: Activation, causal: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, causal)
        self.mlp = MLP([width, 2 * width, width], activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, width] -> [B, T, width]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Transformer on embedded patches or tokens, with ``length`` learned positions.

    If causal, there is an output for each token, else one for the mean; if tied, the head shares
    its weight with the embedding.
    """

    def __init__(
        self,
        embed: nn.Linear | nn.Embedding,
        length: int,
        width: int,
        layers: int,
        activation: Activation,
        answers: int,
        causal: bool,
        tied: bool = False,
    ):
        super().__init__()
        self.embed, self.positions = embed, nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, activation, causal) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, answers)
        self.causal = causal
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, patch] or [B, T] tokens -> [B, answers], or [B, T, answers] if causal."""
        x = self.embed(x) + self.positions.weight[: x.shape[1]]
        x = self.norm(self.layers(x))
        return self.head(x if self.causal else x.mean(1))


@register_family("attention")
def attention(dice: Dice, pictures: Pictures) -> Plan:
    """Transformers of width 8 to 16 on rows of images or on sequences; batches of 4 to 12."""
    width, layers = 4 * dice.integer(2, 4), dice.integer(1, 2)
    activation, batch = dice.pick(*ACTIVATIONS), dice.pick(*((8, 12) if layers == 1 else (4, 8)))
    spread = dice.pick(0.02, 0.1, 1.0)  # standard deviation of embeddings; all three are common

    if dice.chance(0.5):
        size = dice.pick(7, 14) if layers == 1 else 7
        embed = nn.Linear(size, width)
        module = Transformer(embed, size, width, layers, activation, 10, causal=False)
        criterion = F.cross_entropy
        batch = batch // 2 if size == 14 else batch
        examples = Stream(dice, pictures.batches(batch, size, axes=2))
    else:
        kind, vocabulary, length = dice.pick(*SEQUENCES), dice.integer(6, 16), dice.pick(8, 8, 12)
        sequences = kind(dice, vocabulary, length)
        embed, tied = nn.Embedding(vocabulary, width), dice.chance(0.4)
        module = Transformer(
            embed, length, width, layers, activation, vocabulary, causal=True, tied=tied
        )
        criterion = next_tokens
        examples = Stream(dice, lambda dice: sequences(dice, batch))

    start = spread_tables(initial(module, dice), module, spread)
    return Plan(module, start, examples, criterion)


@register_family("patches", share=LARGE)
def patches(dice: Dice, pictures: Pictures) -> Plan:
    """Transformers of width 24 to 48 that classify whole images from 16 patches."""
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
