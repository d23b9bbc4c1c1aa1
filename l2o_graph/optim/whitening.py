"""Averaged gradients -> directions: matrices whitened on both sides, all else entry by entry.

A matrix M becomes (L + d)^-p M (R + d)^-p, where L and R average G G' and G' G over gradients G,
d is a thousandth of their mean eigenvalue and p is chosen by the controller for each matrix. With
p = 1/4 this is Shampoo (Gupta et al. 2018), with 1/2 its square (Morwani et al. 2024), which is
Adafactor in the eigenbasis of SOAP (Vyas et al. 2024). It is a smooth function of the gradients:
unlike Adam in that basis it does not depend on which eigenvectors of equal eigenvalues were found.

Axes here: B matrices of r rows and c columns, s the length of a side.
"""

import torch
from torch import Tensor

# Decay of the averages of G G' and G' G.
GRAM_DECAY = 0.95
# What is added to their eigenvalues, relative to the mean.
DAMPING = 1e-3
# Sides above this are left as they are; of a kernel with positions the neurons are a side then.
LONGEST_SIDE = 1024
# Powers of a side are computed anew after so many steps, of a longer one after one step in 12 of
# its length, so that their share of a step's time stays what it is.
ROOT_PERIOD, LENGTH_PER_STEP = 20, 12
# Averages change quickly at first: ages at which powers are computed anew as well.
FIRST_ROOTS = (0, 1, 3, 6, 10, 15)
# Sides of this length or more are long: their Gram matrices take in one gradient of four, and their
# first powers, which are the identity until then, are computed later, spread over many steps.
LONG_SIDE, LONG_GRAM_PERIOD = 256, 4
LONG_FIRST_ROOTS, SPREAD = (4, 16, 48), 12
# Sides up to this are taken to their powers in float64.
LONGEST_DOUBLE = 640
# Gradients below this count as none: their squares are no numbers.
VANISHING = 1e-19


def sides(rows: int, columns: int, positions: int) -> tuple[int, int]:
    """Lengths of what is whitened on the left and on the right of a matrix; 0 for nothing."""
    left = rows if 1 < rows <= LONGEST_SIDE else 0
    for right in (columns, columns // positions):
        if 1 < right <= LONGEST_SIDE:
            return left, right
    return left, 0


def due(side: int, age: int, matrices: int, first: int) -> range:
    """Of the matrices of a stack, those whose powers are computed anew at an age.

    Args:
        side: Length of the side.
        age: Number of steps before this one.
        matrices: How many there are.
        first: Number of the first of them in the network, by which work is spread over steps.
    """
    period = max(ROOT_PERIOD, side // LENGTH_PER_STEP)
    if side < LONG_SIDE:
        if age in FIRST_ROOTS:
            return range(matrices)
        return range(matrices)[(-age - first) % period :: period]
    for base in LONG_FIRST_ROOTS:
        if base <= age < base + SPREAD:
            return range(matrices)[(age - base - first) % SPREAD :: SPREAD]
    if age < LONG_FIRST_ROOTS[-1] + SPREAD:
        return range(0)
    return range(matrices)[(-age - first) % period :: period]


def take_in(average: Tensor, gradient: Tensor, right: bool, weight: float) -> None:
    """Let averages of G G' (left) or G' G (right) take in a gradient, in place.

    Args:
        average: (B, s, s).
        gradient: (B, r, c); columns are neurons by positions where s is less than c.
        right: Which of the two.
        weight: Weight of the gradient in the average.
    """
    x = gradient
    if right:
        x = gradient.mT
        if average.shape[-1] < x.shape[-2]:
            x = x.unflatten(-2, (average.shape[-1], -1)).flatten(-2)
    average.baddbmm_(x, x.mT, beta=1 - weight, alpha=weight)


def weight_of(age: int, steps: int = 1) -> float:
    """Weight of a value in an average: before long that of a plain mean.

    Args:
        age: How many steps the average stands for already.
        steps: How many steps the value stands for.
    """
    return max(1 - GRAM_DECAY**steps, steps / (age + steps))


def root(average: Tensor, power: Tensor) -> Tensor:
    """(A + d)^-p of Gram matrices, each to its own power, as constants.

    In float64: eigenvalues are squares of what matters, and float32 would lose the small ones. Of
    long sides in the type given, as float64 takes twice the time.

    Args:
        average: A, (B, s, s).
        power: p, (B,).
    """
    double = average.detach()
    if double.shape[-1] <= LONGEST_DOUBLE:
        double = double.double()
    mean = double.diagonal(dim1=-2, dim2=-1).mean(-1)
    unit = torch.where(mean > 0, mean, 1.0)
    values, vectors = torch.linalg.eigh(double / unit[:, None, None])
    scale = (values.clamp(min=0) + DAMPING).pow(-power.detach()[:, None].to(double))
    return torch.bmm(vectors * scale[:, None], vectors.mT).to(average.dtype)


def whitened(mixture: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """P M Q with the roots of both sides: (B, r, c)."""
    x = mixture if left is None else torch.bmm(left, mixture)
    if right is None:
        return x
    side = right.shape[-1]
    if side == x.shape[-1]:
        return torch.bmm(x, right)
    apart = x.unflatten(-1, (side, -1)).mT.flatten(1, 2)  # (B, r positions, s)
    found = torch.bmm(apart, right).unflatten(1, (x.shape[1], -1))
    return found.mT.flatten(-2)


def relative(mixture: Tensor, square: Tensor, mean: Tensor) -> Tensor:
    """Entry by entry: x / (rms + the mean rms), so that rare and small ones stay small.

    Args:
        mixture: (B, r, c).
        square: Average of the gradient's squares.
        mean: (B, 1, 1) 1 / sqrt(number of scalars).
    """
    rms = square.sqrt()
    of_all = torch.linalg.vector_norm(rms, dim=(-2, -1), keepdim=True) * mean
    return mixture / rms.add_(of_all).add_(VANISHING)
