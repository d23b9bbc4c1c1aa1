"""Weights in training: between where updates have led and the average of that.

As in Schedule-Free (Defazio et al. 2024), there are three sequences of weights: z goes by the
updates, x is the running mean of z, and y, where gradients are taken, lies between them:

    z <- z + u        x <- x + c (z - x)        y = (1 - b) z + b x

Kept are y, which are the parameters, and z - x, the offset: whoever writes into the parameters
moves all three.
"""

# pyright: reportPrivateImportUsage=false
# torch has no public names for its functions of many tensors at once.

import torch
from torch import Tensor

# Averaged weights are those of about the last tenth of the run so far: c = 1 / (1 + t / 10).
AVERAGED_PART = 0.1
# b, the share of the average in the weights in training, goes from 0 to this and is half of it
# after so many steps. At first the average is too far behind.
MOST_OF_AVERAGE = 0.9
HALF_OF_IT_AFTER = 300


def share_of_average(age: int) -> float:
    """Share b of the average in the weights after so many steps."""
    return MOST_OF_AVERAGE * age / (age + HALF_OF_IT_AFTER)


def follow(
    parameters: list[Tensor], offsets: list[Tensor], updates: list[Tensor], age: int
) -> None:
    """Make a step of weights in training, all of one age.

    Args:
        parameters: y, to change in place.
        offsets: z - x of each, of its shape, to change in place.
        updates: u of each, what is added to z.
        age: Number t of steps before this one.
    """
    kept = 1 - 1 / (1 + AVERAGED_PART * age)  # 1 - c
    before, after = share_of_average(age), share_of_average(age + 1)
    torch._foreach_add_(offsets, updates)  # z - x, x being that of before
    torch._foreach_add_(parameters, updates, alpha=1 - before)
    torch._foreach_add_(parameters, offsets, alpha=before - kept * after)
    torch._foreach_mul_(offsets, kept)


def averages_of(parameters: list[Tensor], offsets: list[Tensor], age: int) -> list[Tensor]:
    """Average x of each of the parameters y, after so many steps, by its offset z - x."""
    return list(torch._foreach_sub(parameters, offsets, alpha=1 - share_of_average(age)))
