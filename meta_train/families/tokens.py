"""Sequences of tokens to continue: copies, repetitions and Markov chains."""

from collections.abc import Callable

import torch
from torch import Tensor

from meta_train.families.base import Batch
from meta_train.families.dice import Dice

# (dice, batch) -> [P, batch, length] tokens, and those that follow the last ones of them.
Sequences = Callable[[Dice, int], Batch]


def copies(dice: Dice, vocabulary: int, length: int) -> Sequences:
    """Random tokens, a sign, and the same tokens again, which are to be told."""
    half = length // 2

    def make(dice: Dice, batch: int) -> Batch:
        words = dice.integers(vocabulary - 1, batch, half)
        sign = torch.full_like(words[..., :1], vocabulary - 1)
        return torch.cat([words, sign, words[..., :-1]], -1), words

    return make


def repetitions(dice: Dice, vocabulary: int, length: int) -> Sequences:
    """A few random tokens again and again, from anywhere on; the second half is to be told."""

    def make(dice: Dice, batch: int) -> Batch:
        words = dice.integers(vocabulary, batch, length)
        period = 2 + dice.integers(length // 2 - 1, batch, 1)
        line = words.gather(2, torch.arange(length + 1) % period)
        return line[..., :-1], line[..., 1 + length // 2 :]

    return make


def markov_chains(dice: Dice, vocabulary: int, length: int) -> Sequences:
    """Each token depends on the one before, by a table of each pair's own; all are to be told."""
    sharpness = dice.uniform(1, 1, low=1.0, high=3.0)
    table = (sharpness * dice.normal(vocabulary, vocabulary)).softmax(-1).cumsum(-1)

    def make(dice: Dice, batch: int) -> Batch:
        chance = dice.uniform(length, batch, 1)
        line = [dice.integers(vocabulary, batch)]
        pair = torch.arange(dice.pairs)[:, None]
        for i in range(length):
            after = (table[pair, line[-1]] < chance[:, i]).sum(-1)
            line.append(after.clamp(max=vocabulary - 1))
        tokens = torch.stack(line, -1)
        return tokens[..., :-1], tokens[..., 1:]

    return make


SEQUENCES: dict[str, Callable[[Dice, int, int], Sequences]] = {
    "copies": copies,
    "repetitions": repetitions,
    "Markov chains": markov_chains,
}


def one_hot(tokens: Tensor, vocabulary: int) -> Tensor:
    """[...] -> [..., vocabulary]."""
    return torch.nn.functional.one_hot(tokens, vocabulary).float()
