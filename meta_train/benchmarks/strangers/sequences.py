"""Sequence models: language models of characters, images as rows, and sorting."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meta_train.benchmarks.strangers.networks import GPT
from meta_train.benchmarks.strangers.sources import CHARACTERS, text
from meta_train.benchmarks.strangers.task import (
    ACCURACY,
    Batch,
    Make,
    Merit,
    Problem,
    Task,
    generator,
    random_indices,
    seeded,
)
from meta_train.benchmarks.strangers.vision import classification

NUMBERS, LENGTH = 30, 12  # size of the vocabulary and length of the sequences to sort
START = NUMBERS  # token at the start of a sorted sequence


class Recurrent(nn.Module):
    """LSTM language model."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.word = nn.Embedding(words, 32)
        self.cells = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, text: Tensor) -> Tensor:
        """Compute the logits of the next token at each position, [B, T] -> [B, T, words]."""
        return self.head(self.cells(self.word(text))[0])


class RowReader(nn.Module):
    """GRU that classifies an image row by row."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.cells = nn.GRU(28, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Compute class logits, [B, 1, 28, 28] -> [B, 10]."""
        return self.head(self.cells(x.squeeze(1))[0][:, -1])


class Sorter(nn.Module):
    """Encoder-decoder transformer ``nn.Transformer`` with learned positions."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.word, self.place = nn.Embedding(START + 1, width), nn.Embedding(LENGTH, width)
        self.body = nn.Transformer(width, 4, 1, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, NUMBERS)
        ahead = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        self.register_buffer("ahead", ahead, persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Compute the logits of the token after each target token, [B, T] x 2 -> [B, T, 30]."""
        place = self.place.weight
        read, written = self.word(source) + place, self.word(target) + place
        return self.head(self.body(read, written, tgt_mask=self.ahead))


def next_character(build: Callable[[], nn.Module], batch: int, length: int) -> Make:
    """Define a language model [B, T] -> [B, T, words] of Python code, with T = ``length``."""

    def make(seed: int, root: str | None) -> Problem:
        shown, held_out = text()

        def windows(codes: Tensor, starts: Tensor) -> Batch:
            pieces = codes[starts[:, None] + torch.arange(length + 1)]
            return pieces[:, :-1], pieces[:, 1:]

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())

        test = windows(held_out, torch.linspace(0, len(held_out) - length - 2, 200).long())
        return Problem(
            seeded(seed, build),
            loss,
            lambda step: windows(shown, random_indices(len(shown) - length - 1, batch, seed, step)),
            lambda net: loss(net, test),
        )

    return make


def sorting(seed: int, root: str | None) -> Problem:
    """Sort sequences of numbers, with teacher forcing."""

    def draw(count: int, draws: torch.Generator) -> Batch:
        source = torch.randint(NUMBERS, (count, LENGTH), generator=draws)
        answer = source.sort(1).values
        return source, torch.cat([torch.full((count, 1), START), answer[:, :-1]], 1), answer

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        source, target, answer = batch
        return F.cross_entropy(net(source, target).flatten(0, 1), answer.flatten())

    source, target, answer = draw(1000, generator(0, -2))

    def evaluate(net: nn.Module) -> float:
        return 100 * float((net(source, target).argmax(-1) == answer).float().mean())

    net = seeded(seed, Sorter)
    return Problem(net, loss, lambda step: draw(64, generator(seed, step)), evaluate)


WORDS = len(CHARACTERS)
TASKS = (
    Task("gpt", "GPT, 2 layers, characters", Merit("nats"), 300,
         next_character(lambda: GPT(WORDS, 64, 64, 2, 4), 16, 64)),
    Task("lstm", "LSTM, characters", Merit("nats"), 600,
         next_character(lambda: Recurrent(WORDS, 96), 16, 48)),
    Task("gru_rows", "GRU that reads MNIST by rows", ACCURACY, 500,
         classification("mnist", RowReader, 64)),
    Task("sorting", "encoder and decoder that sort", ACCURACY, 200, sorting),
)  # fmt: skip
