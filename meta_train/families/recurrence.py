"""Recurrent networks on rows of images or on sequences, and language models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.attention import Transformer
from meta_train.families.base import Plan, next_tokens, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, Stream
from meta_train.families.images import Pictures
from meta_train.families.networks import ACTIVATIONS, initial, spread_tables
from meta_train.families.registry import LARGE, register_family
from meta_train.families.tokens import markov_chains, one_hot, texts

KINDS: dict[str, type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]] = {
    "tanh": nn.RNN,
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}


class Twin(nn.Module):
    """A recurrent layer of torch and a linear one, which show the structure.

    ``kind`` is one of ``KINDS``. If ``everywhere``, there is an output for every step, else only
    for the last.
    """

    def __init__(self, kind: str, inputs: int, hidden: int, answers: int, everywhere: bool):
        super().__init__()
        self.layer = KINDS[kind](inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, answers)
        self.kind, self.everywhere = kind, everywhere

    def states(self, x: Tensor) -> Tensor:
        """Map [B, T, inputs] -> [B, T, hidden]."""
        return self.layer(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, inputs] -> [B, answers], or [B, T, answers]."""
        states = self.states(x)
        return self.head(states if self.everywhere else states[:, -1])


class StepByStep(Twin):
    """The same computation step by step, which works with ``vmap``."""

    def states(self, x: Tensor) -> Tensor:
        """Map [B, T, inputs] -> [B, T, hidden]."""
        layer: Any = self.layer  # its parameters are not annotated
        read = x @ layer.weight_ih_l0.T + layer.bias_ih_l0
        h = cell = read.new_zeros(x.shape[0], layer.hidden_size)
        states = []
        for step in read.unbind(1):
            kept = h @ layer.weight_hh_l0.T + layer.bias_hh_l0
            if self.kind == "tanh":
                h = torch.tanh(step + kept)
            elif self.kind == "gru":
                h = _gru(step, kept, h)
            else:
                h, cell = _lstm(step + kept, cell)
            states.append(h)
        return torch.stack(states, 1)


def _gru(read: Tensor, kept: Tensor, h: Tensor) -> Tensor:
    """Compute a GRU step; gates are in torch's order: reset, update, new."""
    n = h.shape[-1]
    reset, update = torch.sigmoid(read[:, : 2 * n] + kept[:, : 2 * n]).chunk(2, -1)
    new = torch.tanh(read[:, 2 * n :] + reset * kept[:, 2 * n :])
    return new + update * (h - new)


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Compute an LSTM step; gates are in torch's order: input, forget, cell, output."""
    i, f, g, o = gates.chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def adding(length: int, batch: int) -> Callable[[Dice], Batch]:
    """Create batches of the adding problem: the target is the sum of two marked numbers."""

    def make(dice: Dice) -> Batch:
        numbers = dice.uniform(batch, length)
        half = length // 2
        # One mark in each half, as in Hochreiter and Schmidhuber (1997).
        places = torch.cat([dice.integers(half, batch, 1), half + dice.integers(half, batch, 1)], 2)
        marks = torch.zeros_like(numbers).scatter(2, places, 1.0)
        return torch.stack([numbers, marks], -1), (numbers * marks).sum(-1, keepdim=True)

    return make


@register_family("recurrence")
def recurrence(dice: Dice, pictures: Pictures) -> Plan:
    """RNNs of 12 to 24 neurons on rows of images, the adding problem or Markov chains."""
    kind, hidden, batch = dice.pick(*KINDS), dice.integer(12, 24), dice.pick(8, 16, 32)
    task = dice.pick("rows of 7 x 7 images", "sums of two of 8", "Markov chains")
    if task == "Markov chains":
        vocabulary = dice.integer(6, 12)
        sequences = markov_chains(dice, vocabulary, length=8)
        shape, criterion = (vocabulary, hidden, vocabulary, True), next_tokens

        def make(dice: Dice) -> Batch:
            x, y = sequences(dice, batch)
            return one_hot(x, vocabulary), y

        examples = Stream(dice, make)
    elif task == "sums of two of 8":
        shape, criterion = (2, hidden, 1, False), squared
        examples = Stream(dice, adding(8, batch))
    else:
        shape, criterion = (7, hidden, 10, False), F.cross_entropy
        examples = Stream(dice, pictures.batches(batch, axes=2))
    module, twin = StepByStep(kind, *shape), Twin(kind, *shape)
    return Plan(module, initial(module, dice), examples, criterion, twin)


@register_family("language", share=LARGE)
def language(dice: Dice, pictures: Pictures) -> Plan:
    """Transformers, GRUs and LSTMs of width 24 to 64 that predict letters of synthetic texts."""
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
