"""Sequences: characters, rows of images, numbers put in order."""

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
    Problem,
    Task,
    generator,
    lower,
    pick,
    seeded,
)
from meta_train.benchmarks.strangers.vision import classified

NUMBERS, LENGTH = 30, 12  # that there are, and that are to be sorted
START = NUMBERS  # the word that a sorted sequence begins with


class Recurrent(nn.Module):
    """An embedding, an LSTM, and the scores of the next character at every place."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.word = nn.Embedding(words, 32)
        self.cells = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, text: Tensor) -> Tensor:
        """Scores (batch, tokens, words) of words (batch, tokens)."""
        return self.head(self.cells(self.word(text))[0])


class RowReader(nn.Module):
    """A GRU that sees an image row by row."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.cells = nn.GRU(28, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(self.cells(x.squeeze(1))[0][:, -1])


class Sorter(nn.Module):
    """An encoder and a decoder, as torch has them."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.word, self.place = nn.Embedding(START + 1, width), nn.Embedding(LENGTH, width)
        self.body = nn.Transformer(width, 4, 1, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, NUMBERS)
        ahead = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        self.register_buffer("ahead", ahead, persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores (batch, tokens, numbers) of what follows each word of the target."""
        place = self.place.weight
        read, said = self.word(source) + place, self.word(target) + place
        return self.head(self.body(read, said, tgt_mask=self.ahead))


def next_character(build: Callable[[], nn.Module], batch: int, length: int) -> Make:
    """The next character of Python sources, with a network that gives scores at every place."""

    def make(seed: int, root: str | None) -> Problem:
        shown, held_out = text()

        def cut(codes: Tensor, starts: Tensor) -> Batch:
            pieces = codes[starts[:, None] + torch.arange(length + 1)]
            return pieces[:, :-1], pieces[:, 1:]

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())

        tested = cut(held_out, torch.linspace(0, len(held_out) - length - 2, 200).long())
        return Problem(
            seeded(seed, build),
            loss,
            lambda step: cut(shown, pick(len(shown) - length - 1, batch, seed, step)),
            lambda net: float(loss(net, tested)),
        )

    return make


def sorting(seed: int, root: str | None) -> Problem:
    """Numbers come out in order."""

    def drawn(count: int, draws: torch.Generator) -> Batch:
        source = torch.randint(NUMBERS, (count, LENGTH), generator=draws)
        answer = source.sort(1).values
        return source, torch.cat([torch.full((count, 1), START), answer[:, :-1]], 1), answer

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        source, target, answer = batch
        return F.cross_entropy(net(source, target).flatten(0, 1), answer.flatten())

    tested = drawn(1000, generator(0, -2))

    def evaluate(net: nn.Module) -> float:
        source, target, answer = tested
        return 100 * float((net(source, target).argmax(-1) == answer).float().mean())

    net = seeded(seed, Sorter)
    return Problem(net, loss, lambda step: drawn(64, generator(seed, step)), evaluate)


WORDS = len(CHARACTERS)
TASKS = (
    Task("gpt", "GPT, 2 layers, characters", lower("nats"), 300,
         next_character(lambda: GPT(WORDS, 64, 64, 2, 4), 16, 64)),
    Task("lstm", "LSTM, characters", lower("nats"), 600,
         next_character(lambda: Recurrent(WORDS, 96), 16, 48)),
    Task("gru_rows", "GRU that reads MNIST by rows", ACCURACY, 500,
         classified("mnist", RowReader, 64)),
    Task("sorting", "encoder and decoder that sort", ACCURACY, 200, sorting),
)  # fmt: skip
