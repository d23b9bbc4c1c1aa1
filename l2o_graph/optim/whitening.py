"""Directions from momenta: matrices whitened on both sides, everything else elementwise.

A matrix M becomes (L + d)^-p M (R + d)^-p, where L and R average G G' and G' G over gradients G,
d is a thousandth of their mean eigenvalue, and p is learned, with a factor for each matrix. With
p = 1/4 this is Shampoo (Gupta et al. 2018), with 1/2 its square (Morwani et al. 2024), which is
Adafactor in the eigenbasis of SOAP (Vyas et al. 2024). It is a smooth function of the gradients:
unlike Adam in that basis it does not depend on the choice of eigenvectors of equal eigenvalues.

A long side is whitened in separate blocks of adjacent neurons (Anil et al. 2020).

Axes here: B matrices of r rows and c columns, k blocks of s neurons on a side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Decay of the averages of G G' and G' G.
GRAM_DECAY = 0.95
# Added to their eigenvalues, relative to the mean.
DAMPING = 1e-3
# Blocks of a side are of equal length and as long as possible. A side that does not divide into few
# and long enough blocks is not whitened. For a kernel with more columns than a block may have, the
# right side is its neurons alone, and positions are part of the batch.
LONGEST_BLOCK, SHORTEST_BLOCK, MOST_BLOCKS = 640, 64, 16
# Powers of a side of length s are recomputed every max(20, s / 12) steps, so that their share of a
# step's time stays about constant.
ROOT_PERIOD, LENGTH_PER_STEP = 20, 12
# Averages change quickly at first: further ages at which powers are recomputed.
FIRST_ROOTS = (0, 1, 3, 6, 10, 15)
# Gram matrices of sides of at least this length take in only one gradient of four. Their first
# powers are computed later, spread over SPREAD steps each; before, they are the identity.
LONG_SIDE, LONG_GRAM_PERIOD = 256, 4
LONG_FIRST_ROOTS, SPREAD = (4, 16, 48), 12
# Gradients below this count as 0: their squares underflow.
VANISHING = 1e-19


@dataclass(frozen=True, slots=True)
class Side:
    """Division of one side of a matrix into blocks that are whitened.

    Attributes:
        length: Number of neurons of a block, s.
        blocks: Number of blocks, k.
        positions: Number of positions of a neuron, adjacent in the matrix.
    """

    length: int
    blocks: int = 1
    positions: int = 1


def sides(rows: int, columns: int, positions: int) -> tuple[Side | None, Side | None]:
    """Determine the whitening of the left and the right side of a matrix; None for no whitening."""
    apart = positions if columns > LONGEST_BLOCK else 1
    return _side(rows), _side(columns // apart, apart)


def _side(neurons: int, positions: int = 1) -> Side | None:
    """Divide a side into as few blocks of equal length as possible."""
    if neurons <= LONGEST_BLOCK:
        return Side(neurons, 1, positions) if neurons > 1 else None
    for blocks in range(2, min(neurons // SHORTEST_BLOCK, MOST_BLOCKS) + 1):
        if neurons % blocks == 0 and neurons // blocks <= LONGEST_BLOCK:
            return Side(neurons // blocks, blocks, positions)
    return None


def due(length: int, age: int, count: int, first: int) -> range:
    """Return the blocks of a stack whose powers are recomputed at an age.

    Args:
        length: Length of a block.
        age: Number of steps before this one.
        count: Number of blocks.
        first: Index of the first of them in the network, which spreads the work over steps.
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
    """Update averages of G G' (left) or G' G (right) with a gradient, in place.

    Args:
        average: Averages, (B, k, s, s).
        gradient: Gradient, (B, r, c).
        side: Side that is whitened.
        right: Whether it is the right side.
        weight: Weight of the gradient in the average.
    """
    x = gradient.mT if right else gradient
    # No needless views: on small networks each costs as much as a product.
    if side.positions > 1:
        x = x.unflatten(1, (-1, side.positions)).flatten(2)  # (B, neurons, positions r)
    if side.blocks > 1:
        x = x.unflatten(1, (side.blocks, side.length)).flatten(0, 1)
    average.flatten(0, 1).baddbmm_(x, x.mT, beta=1 - weight, alpha=weight)


def weight_of(age: int, steps: int = 1) -> float:
    """Compute the weight of a new value in an average, which is a plain mean at first.

    Args:
        age: Number of steps that the average covers already.
        steps: Number of steps that the value stands for.
    """
    return max(1 - GRAM_DECAY**steps, steps / (age + steps))


def root(average: Tensor, power: Tensor) -> Tensor:
    """Compute (A + d)^-p of Gram matrices, without gradients.

    In float64: eigenvalues are squared singular values, and float32 would lose the small ones.

    Args:
        average: Gram matrices A, (B, s, s).
        power: Powers p, (B,).
    """
    double = average.detach().double()
    mean = double.diagonal(dim1=-2, dim2=-1).mean(-1)
    unit = torch.where(mean > 0, mean, 1.0)
    values, vectors = torch.linalg.eigh(double / unit[:, None, None])
    scale = (values.clamp(min=0) + DAMPING).pow(-power.detach()[:, None].to(double))
    return torch.bmm(vectors * scale[:, None], vectors.mT).to(average.dtype)


def whitened_left(x: Tensor, root: Tensor, side: Side) -> Tensor:
    """Multiply X from the left by the roots of each block of rows, (B, k, s, s): (B, r, c)."""
    if side.blocks == 1:
        return torch.bmm(root[:, 0], x)
    blocks = x.unflatten(1, (side.blocks, side.length)).flatten(0, 1)
    return torch.bmm(root.flatten(0, 1), blocks).view(x.shape)


def whitened_right(x: Tensor, root: Tensor, side: Side, out: Tensor | None = None) -> Tensor:
    """Multiply X from the right by the roots of each block of columns, into ``out`` if given."""
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
    """Compute the elementwise direction x / (rms + mean rms), in place.

    Entries with rare or small gradients take small steps.

    Args:
        mixture: Mixture of momenta, (B, r, c).
        square: Average of the gradient's squares.
        mean: (B, 1, 1) 1 / sqrt(number of scalars).
    """
    rms = square.sqrt()
    of_all = torch.linalg.vector_norm(rms, dim=(-2, -1), keepdim=True) * mean
    return mixture.div_(rms.add_(of_all).add_(VANISHING))
