"""Sources of batches: new examples at every step, or a fixed set of examples."""

from collections.abc import Callable

import torch
from torch import Tensor

from l2o_graph.optim.examples import fewness, numbers_of
from meta_train.families.dice import Dice

Batch = tuple[Tensor, Tensor]  # inputs and targets, [P, ...] each


class Stream:
    """Source of new examples at every step.

    Args:
        dice: Random numbers.
        make: Function that draws a batch, [P, ...] each.
    """

    held_out: Batch | None = None

    def __init__(self, dice: Dice, make: Callable[[Dice], Batch]):
        self._dice, self._make = dice, make

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, which is deterministic."""
        return self._make(self._dice.other("step", step))

    def few(self, step: int, parameters: int) -> None:
        """Return None, see ``FixedSet.few``: all examples are new."""


class FixedSet:
    """Fixed set of examples, in shuffled epochs, or all of them at every step.

    Args:
        dice: Random numbers for shuffling.
        examples: Inputs and targets, [P, n, ...] each.
        size: Size of a batch; 0 for all examples.
        held_out: Held-out examples, if there are any.
    """

    def __init__(self, dice: Dice, examples: Batch, size: int = 0, held_out: Batch | None = None):
        self._dice, self._examples, self.held_out = dice, examples, held_out
        self._count = examples[0].shape[1]
        self._size = min(size or self._count, self._count)
        self._epoch, self._orders = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        if self._size == self._count:
            return self._examples
        epoch, at = divmod(step, self._count // self._size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._orders = self._dice.other("epoch", epoch).orders(self._count)
        index = self._orders[:, at * self._size : (at + 1) * self._size]
        x, y = self._examples
        return rows(x, index), rows(y, index)

    def few(self, step: int, parameters: int) -> Tensor:
        """Compute the degree to which examples are few for a network of so many parameters, ().

        See ``optim.examples.fewness``.
        """
        seen = (step + 1) * self._size
        different = torch.tensor(float(min(seen, self._count)))
        return fewness(different, seen, numbers_of(self._examples[0][0]), float(parameters))


Examples = Stream | FixedSet


def rows(t: Tensor, index: Tensor) -> Tensor:
    """Select rows: [P, n, ...] and [P, k] -> [P, k, ...]."""
    return t[torch.arange(len(t))[:, None], index]


def noisy_labels(dice: Dice, labels: Tensor, share: Tensor) -> Tensor:
    """Replace a fraction ``share``, (P,), of labels of ten classes by random ones."""
    others = dice.integers(10, *labels.shape[1:])
    return torch.where(dice.uniform(*labels.shape[1:]) < share[:, None], others, labels)
