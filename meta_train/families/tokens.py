"""Sequences of tokens to predict: copies, repetitions, Markov chains and texts."""

from collections.abc import Callable

import torch
from torch import Tensor

from meta_train.families.dice import Dice
from meta_train.families.examples import Batch

# (dice, batch) -> [P, batch, length] tokens, and the targets of the last positions.
Sequences = Callable[[Dice, int], Batch]


def copies(dice: Dice, vocabulary: int, length: int) -> Sequences:
    """Create batches of random tokens, a separator, and the same tokens again as targets."""
    half = length // 2

    def make(dice: Dice, batch: int) -> Batch:
        words = dice.integers(vocabulary - 1, batch, half)
        sign = torch.full_like(words[..., :1], vocabulary - 1)
        return torch.cat([words, sign, words[..., :-1]], -1), words

    return make


def repetitions(dice: Dice, vocabulary: int, length: int) -> Sequences:
    """Create batches of a few repeated random tokens; targets are those of the second half."""

    def make(dice: Dice, batch: int) -> Batch:
        words = dice.integers(vocabulary, batch, length)
        period = 2 + dice.integers(length // 2 - 1, batch, 1)
        line = words.gather(2, torch.arange(length + 1) % period)
        return line[..., :-1], line[..., 1 + length // 2 :]

    return make


def markov_chains(dice: Dice, vocabulary: int, length: int) -> Sequences:
    """Create batches of Markov chains, with a table for each pair; all tokens are targets."""
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


WORDS, LONGEST_WORD = 48, 5  # size of a lexicon, and letters of its longest words
CHAINS, CHAIN = 256, 40  # number of chains of words, and words of each


def texts(dice: Dice, vocabulary: int, length: int) -> Sequences:
    """Create batches of windows of a text: a Markov chain of words, with a lexicon for each pair.

    Some words are frequent and most are rare, so that there is always more to learn. The last
    letter is the space between words.
    """
    letters = dice.integers(vocabulary - 1, WORDS, LONGEST_WORD)
    ends = 1 + dice.integers(LONGEST_WORD, WORDS, 1)
    places = torch.arange(LONGEST_WORD)
    spelled = torch.where(places < ends, letters, vocabulary - 1)
    spelled = torch.nn.functional.pad(spelled, (0, 1), value=vocabulary - 1)
    used = torch.arange(LONGEST_WORD + 1) <= ends  # letters and one space
    rarity = -torch.arange(1, WORDS + 1).log()
    table = (rarity + 1.5 * dice.normal(WORDS, WORDS)).softmax(-1).cumsum(-1)
    pair = torch.arange(dice.pairs)[:, None]
    chance = dice.uniform(CHAIN, CHAINS)
    word = dice.integers(WORDS, CHAINS)
    words = []
    for i in range(CHAIN):
        word = (table[pair, word] < chance[:, i, :, None]).sum(-1).clamp(max=WORDS - 1)
        words.append(word)
    line = torch.stack(words, -1).flatten(1)  # [P, words of the text]
    # Each word has at least two letters, including the space.
    written = [spelled[p, line[p]][used[p, line[p]]] for p in range(dice.pairs)]
    text = torch.stack([letters[: 2 * CHAIN * CHAINS] for letters in written])

    def make(dice: Dice, batch: int) -> Batch:
        first = dice.integers(text.shape[1] - length - 1, batch, 1)
        tokens = text.gather(1, (first + torch.arange(length + 1)).flatten(1))
        tokens = tokens.unflatten(1, (batch, length + 1))
        return tokens[..., :-1], tokens[..., 1:]

    return make


SEQUENCES = (copies, repetitions, markov_chains)


def one_hot(tokens: Tensor, vocabulary: int) -> Tensor:
    """Encode tokens as one-hot vectors, [...] -> [..., vocabulary]."""
    return torch.nn.functional.one_hot(tokens, vocabulary).float()
