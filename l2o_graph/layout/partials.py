"""Partial aggregates of messages, mergeable: a streaming mean and an online softmax."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# PyTorch Geometric's floor under a variance; at or below it the standard deviation is called 0.
SMALLEST_VARIANCE = 1e-5


@dataclass(frozen=True, slots=True)
class PNAPartial:
    """Partial PNA aggregate of the messages that reached n nodes.

    Attributes:
        count: Messages that reached each node, one number for all or one for each.
        total: Their sum and the sum of their squares.
        low: Their minimum.
        high: Their maximum.
    """

    count: int | Float[Tensor, "n 1"]
    total: Float[Tensor, "*B n two_H"]
    low: Float[Tensor, "*B n H"]
    high: Float[Tensor, "*B n H"]

    @staticmethod
    def of(grid: Float[Tensor, "*B g r c H"], dim: int) -> "PNAPartial":
        """Aggregate the messages of groups of rows and columns along one of the two."""
        # Not torch.aminmax: ten times slower on a CPU than one after the other.
        low, high = grid.amin(dim).flatten(-3, -2), grid.amax(dim).flatten(-3, -2)
        squares = grid.square().sum(dim)
        total = torch.cat([grid.sum(dim), squares], dim=-1).flatten(-3, -2)
        return PNAPartial(grid.shape[dim], total, low, high)

    def part(self, start: int, stop: int) -> "PNAPartial":
        """Slice of the nodes."""
        total, low, high = (x[..., start:stop, :] for x in (self.total, self.low, self.high))
        return PNAPartial(self.count, total, low, high)

    def merge(self, other: "PNAPartial") -> "PNAPartial":
        """Merge with more messages to the same nodes."""
        return PNAPartial(
            self.count + other.count,
            self.total + other.total,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )

    def aggregates(self) -> Float[Tensor, "*B n four_H"]:
        """Mean, minimum, maximum and standard deviation."""
        mean, square = (self.total / self.count).chunk(2, dim=-1)
        variance = (square - mean * mean).clamp(min=SMALLEST_VARIANCE)
        deviation = variance.sqrt().masked_fill(variance <= SMALLEST_VARIANCE, 0.0)
        return torch.cat([mean, self.low, self.high, deviation], dim=-1)


@dataclass(frozen=True, slots=True)
class SoftmaxPartial:
    """Partial attention of n nodes to some of their pairs, as in online softmax.

    Attributes:
        log_mass: Log of the sum of exp(score).
        mean: Mean of the values, weighted by exp(score).
        edges: Sums of the states of the edges that lead to each node, and of those that leave it.
    """

    log_mass: Float[Tensor, "*B heads n"]
    mean: Float[Tensor, "*B heads d n"]
    edges: Float[Tensor, "*B 2 n C"]

    def part(self, start: int, stop: int) -> "SoftmaxPartial":
        """Slice of the nodes."""
        own = slice(start, stop)
        return SoftmaxPartial(self.log_mass[..., own], self.mean[..., own], self.edges[..., own, :])

    def merge(self, other: "SoftmaxPartial") -> "SoftmaxPartial":
        """Merge with more pairs of the same nodes."""
        log_mass = torch.logaddexp(self.log_mass, other.log_mass)
        own = (self.log_mass - log_mass).exp().unsqueeze(-2)
        others = (other.log_mass - log_mass).exp().unsqueeze(-2)
        mean = torch.addcmul(own * self.mean, others, other.mean)
        return SoftmaxPartial(log_mass, mean, self.edges + other.edges)

    @staticmethod
    def cat(parts: Sequence["SoftmaxPartial"]) -> "SoftmaxPartial":
        """Concatenate partials of further nodes, in order."""
        return SoftmaxPartial(
            torch.cat([part.log_mass for part in parts], dim=-1),
            torch.cat([part.mean for part in parts], dim=-1),
            torch.cat([part.edges for part in parts], dim=-2),
        )
