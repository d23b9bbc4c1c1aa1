"""Weights in training: between the updated weights and their running average.

As in Schedule-Free (Defazio et al. 2024), there are three sequences of weights: updates move z,
x is a running mean of z, and y, where gradients are computed, lies between them:

    z <- z + u        x <- x + c (z - x)        y = (1 - b) z + b x

Stored are y, which are the parameters, and the offset z - x. Writing into the parameters thus
moves all three.
"""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor functions have no public names.

import torch
from torch import Tensor

# x averages over about the last tenth of the run so far: c = 1 / (1 + t / 10).
AVERAGED_PART = 0.1
# b, the share of the average in the weights in training, grows from 0 towards the first number and
# reaches half of it after the second number of steps. At first the average lags too far behind.
MOST_OF_AVERAGE = 0.9
HALF_OF_IT_AFTER = 300


def share_of_average(age: int) -> float:
    """Return the share b of the average in the weights after ``age`` steps."""
    return MOST_OF_AVERAGE * age / (age + HALF_OF_IT_AFTER)


def follow(
    parameters: list[Tensor], offsets: list[Tensor], updates: list[Tensor], age: int
) -> None:
    """Apply updates to parameters that are all of one age.

    Args:
        parameters: Weights y, changed in place.
        offsets: Offset z - x of each, of its shape, changed in place.
        updates: Update u of each, which is added to z.
        age: Number t of steps before this one.
    """
    kept = 1 - 1 / (1 + AVERAGED_PART * age)  # 1 - c
    before, after = share_of_average(age), share_of_average(age + 1)
    torch._foreach_add_(offsets, updates)  # z - x with the old x
    torch._foreach_add_(parameters, updates, alpha=1 - before)
    torch._foreach_add_(parameters, offsets, alpha=before - kept * after)
    torch._foreach_mul_(offsets, kept)


def averages_of(parameters: list[Tensor], offsets: list[Tensor], age: int) -> list[Tensor]:
    """Compute the averages x from parameters y and offsets z - x after ``age`` steps."""
    return list(torch._foreach_sub(parameters, offsets, alpha=1 - share_of_average(age)))
