"""Averaged gradients -> directions: matrices whitened on both sides, all else entry by entry.

A matrix M becomes (L + d)^-p M (R + d)^-p, where L and R average G G' and G' G over gradients G,
d is a thousandth of their mean eigenvalue and p is chosen by the controller for each matrix. With
p = 1/4 this is Shampoo (Gupta et al. 2018), with 1/2 its square (Morwani et al. 2024), which is
Adafactor in the eigenbasis of SOAP (Vyas et al. 2024). It is a smooth function of the gradients:
unlike Adam in that basis it does not depend on which eigenvectors of equal eigenvalues were found.

A long side is whitened in blocks of neurons next to each other, each by itself (Anil et al. 2020).

Axes here: B matrices of r rows and c columns, k blocks of s neurons on a side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Decay of the averages of G G' and G' G.
GRAM_DECAY = 0.95
# What is added to their eigenvalues, relative to the mean.
DAMPING = 1e-3
# Blocks are as long as they can be up to this, all of one length; a side that does not divide into
# a few blocks of at least the shortest is left as it is. Kernels with more columns than fit into a
# block have their neurons as right side, and positions are rows.
LONGEST_BLOCK, SHORTEST_BLOCK, MOST_BLOCKS = 640, 64, 16
# Powers of a side are computed anew after so many steps, of a longer one after one step in 12 of
# its length, so that their share of a step's time stays what it is.
ROOT_PERIOD, LENGTH_PER_STEP = 20, 12
# Averages change quickly at first: ages at which powers are computed anew as well.
FIRST_ROOTS = (0, 1, 3, 6, 10, 15)
# Sides of this length or more are long: their Gram matrices take in one gradient of four, and their
# first powers, which are the identity until then, are computed later, spread over many steps.
LONG_SIDE, LONG_GRAM_PERIOD = 256, 4
LONG_FIRST_ROOTS, SPREAD = (4, 16, 48), 12
# Gradients below this count as none: their squares are no numbers.
VANISHING = 1e-19


@dataclass(frozen=True, slots=True)
class Side:
    """What is whitened on a side of a matrix.

    Attributes:
        length: Number of neurons of a block, s.
        blocks: Number of blocks, k.
        positions: Number of positions of a neuron, next to each other in the matrix.
    """

    length: int
    blocks: int = 1
    positions: int = 1


def sides(rows: int, columns: int, positions: int) -> tuple[Side | None, Side | None]:
    """What is whitened on the left and on the right of a matrix; None for nothing."""
    apart = positions if columns > LONGEST_BLOCK else 1
    return _side(rows), _side(columns // apart, apart)


def _side(neurons: int, positions: int = 1) -> Side | None:
    """As few blocks as possible, all of one length."""
    if neurons <= LONGEST_BLOCK:
        return Side(neurons, 1, positions) if neurons > 1 else None
    for blocks in range(2, min(neurons // SHORTEST_BLOCK, MOST_BLOCKS) + 1):
        if neurons % blocks == 0 and neurons // blocks <= LONGEST_BLOCK:
            return Side(neurons // blocks, blocks, positions)
    return None


def due(length: int, age: int, count: int, first: int) -> range:
    """Of the blocks of a stack, those whose powers are computed anew at an age.

    Args:
        length: Length of a block.
        age: Number of steps before this one.
        count: Number of them.
        first: Number of the first of them in the network, by which work is spread over steps.
    """
    period = max(ROOT_PERIOD, length // LENGTH_PER_STEP)
    if length < LONG_SIDE:
        if age in FIRST_ROOTS:
            return range(count)
        return range(count)[(-age - first) % period :: period]
    for base in LONG_FIRST_ROOTS:
        if base <= age < base + SPREAD:
            return range(count)[(age - base - first) % SPREAD :: SPREAD]
    if age < LONG_FIRST_ROOTS[-1] + SPREAD:
        return range(0)
    return range(count)[(-age - first) % period :: period]


def take_in(average: Tensor, gradient: Tensor, side: Side, right: bool, weight: float) -> None:
    """Let averages of G G' (left) or G' G (right) take in a gradient, in place.

    Args:
        average: (B, k, s, s).
        gradient: (B, r, c).
        side: The side.
        right: Whether it is the right one.
        weight: Weight of the gradient in the average.
    """
    x = gradient.mT if right else gradient
    # Views are spared where there is nothing to divide: on small networks each costs as a product.
    if side.positions > 1:
        x = x.unflatten(1, (-1, side.positions)).flatten(2)  # (B, neurons, positions r)
    if side.blocks > 1:
        x = x.unflatten(1, (side.blocks, side.length)).flatten(0, 1)
    average.flatten(0, 1).baddbmm_(x, x.mT, beta=1 - weight, alpha=weight)


def weight_of(age: int, steps: int = 1) -> float:
    """Weight of a value in an average: before long that of a plain mean.

    Args:
        age: Number of steps that the average stands for already.
        steps: Number of steps that the value stands for.
    """
    return max(1 - GRAM_DECAY**steps, steps / (age + steps))


def root(average: Tensor, power: Tensor) -> Tensor:
    """(A + d)^-p of Gram matrices, each to its own power, as constants.

    In float64: eigenvalues are squares of what matters, and float32 would lose the small ones.

    Args:
        average: A, (B, s, s).
        power: p, (B,).
    """
    double = average.detach().double()
    mean = double.diagonal(dim1=-2, dim2=-1).mean(-1)
    unit = torch.where(mean > 0, mean, 1.0)
    values, vectors = torch.linalg.eigh(double / unit[:, None, None])
    scale = (values.clamp(min=0) + DAMPING).pow(-power.detach()[:, None].to(double))
    return torch.bmm(vectors * scale[:, None], vectors.mT).to(average.dtype)


def whitened_left(x: Tensor, root: Tensor, side: Side) -> Tensor:
    """P X with the roots of each block of rows (B, k, s, s): (B, r, c)."""
    if side.blocks == 1:
        return torch.bmm(root[:, 0], x)
    blocks = x.unflatten(1, (side.blocks, side.length)).flatten(0, 1)
    return torch.bmm(root.flatten(0, 1), blocks).view(x.shape)


def whitened_right(x: Tensor, root: Tensor, side: Side, out: Tensor | None = None) -> Tensor:
    """X Q with the roots of each block of columns (B, k, s, s): (B, r, c), in ``out`` if given."""
    if side.blocks == side.positions == 1:
        return torch.bmm(x, root[:, 0], out=out)
    out = torch.empty_like(x) if out is None else out
    apart, into = (
        t.unflatten(2, (side.blocks, side.length, side.positions)).permute(0, 2, 1, 4, 3)
        for t in (x, out)
    )  # (B, k, r, positions, s)
    if side.positions == len(x) == 1:  # without copies
        torch.bmm(apart[0, :, :, 0], root[0], out=into[0, :, :, 0])
    else:
        found = torch.bmm(apart.flatten(2, 3).flatten(0, 1), root.flatten(0, 1))
        into.copy_(found.view(apart.shape))
    return out


def relative(mixture: Tensor, square: Tensor, mean: Tensor) -> Tensor:
    """Entry by entry: x / (rms + the mean rms), so that rare and small ones stay small, in place.

    Args:
        mixture: (B, r, c).
        square: Average of the gradient's squares.
        mean: (B, 1, 1) 1 / sqrt(number of scalars).
    """
    rms = square.sqrt()
    of_all = torch.linalg.vector_norm(rms, dim=(-2, -1), keepdim=True) * mean
    return mixture.div_(rms.add_(of_all).add_(VANISHING))
