"""Embeddings: classification of bags of words, and ratings of items by users."""

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.base import Plan, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, Examples, FixedSet, Stream, rows
from meta_train.families.images import Pictures
from meta_train.families.networks import MLP, initial, spread_tables
from meta_train.families.registry import register_family

CLASSES = 6


class Bag(nn.Module):
    """MLP on the mean of word vectors, with a hidden layer unless ``hidden`` is 0."""

    def __init__(self, words: int, width: int, hidden: int):
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.mlp = MLP([width, *([hidden] if hidden else []), CLASSES], F.relu)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, words of a bag] -> [B, classes]."""
        return self.mlp(self.table(x).mean(1))


class Ratings(nn.Module):
    """Matrix factorisation: products of vectors of users and items, optionally with biases."""

    def __init__(self, users: int, things: int, width: int, biased: bool):
        super().__init__()
        self.users, self.things = nn.Embedding(users, width), nn.Embedding(things, width)
        self.biased = biased
        if biased:
            self.of_user, self.of_thing = nn.Embedding(users, 1), nn.Embedding(things, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 2] pairs of user and thing -> [B]."""
        user, thing = x.unbind(1)
        rating = (self.users(user) * self.things(thing)).sum(-1)
        if self.biased:
            rating = rating + (self.of_user(user) + self.of_thing(thing))[:, 0]
        return rating


NUM_HELD_OUT = 512  # number of held-out ratings, if the training set is fixed


@register_family("embedding")
def embedding(dice: Dice, pictures: Pictures) -> Plan:
    """Embeddings of words or items, by Zipf's law: most rows of a table are rarely used."""
    width, batch, spread = dice.integer(4, 12), dice.pick(16, 32, 64, 128), dice.pick(0.1, 0.3, 1.0)
    if dice.chance(0.5):
        words, hidden, length = dice.integer(50, 200), dice.pick(0, 16), dice.integer(6, 12)
        meaning = dice.normal(words, CLASSES)
        noise = dice.pick(0.0, 0.5)

        def make(dice: Dice) -> Batch:
            x = dice.zipf(words, batch, length)
            scores = rows(meaning, x.flatten(1)).unflatten(1, (batch, length)).sum(2)
            return x, (scores + noise * sqrt(length) * dice.normal(batch, CLASSES)).argmax(-1)

        module: nn.Module = Bag(words, width, hidden)
        examples: Examples = Stream(dice, make)
        criterion = F.cross_entropy
    else:
        users, things, rank = dice.integer(40, 120), dice.integer(30, 80), dice.integer(2, 5)
        left, right = dice.normal(users, rank), dice.normal(things, rank) / sqrt(rank)
        mean, noise = dice.pick(0.0, 1.0), dice.pick(0.0, 0.3)

        def rate(dice: Dice, count: int) -> Batch:
            user, thing = dice.zipf(users, count), dice.zipf(things, count)
            rating = (rows(left, user) * rows(right, thing)).sum(-1) + mean
            return torch.stack([user, thing], -1), rating + noise * dice.normal(count)

        module = Ratings(users, things, width, dice.chance(0.5))
        criterion = squared
        if dice.chance(0.5):
            held_out = rate(dice.other("judges"), NUM_HELD_OUT)
            examples = FixedSet(dice, rate(dice.other("ratings"), 1024), batch, held_out)
        else:
            examples = Stream(dice, lambda dice: rate(dice, batch))
    start = spread_tables(initial(module, dice), module, spread)
    return Plan(module, start, examples, criterion)
