"""Aggregation of segments over nodes. A segment is the edges from one kernel into one node.

Axes: S segments, n receiving nodes.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Segments that lead to each node.

    Attributes:
        to: Node that each segment leads to, as an index among the receiving nodes.
        place: Segments of each node, padded with S.
        degree: Number of directed edges that lead to each node.
    """

    to: Int64[Tensor, " S"]
    place: Int64[Tensor, "n most"]
    degree: Float[Tensor, " n"]

    def added(self, x: Float[Tensor, "*B S C"]) -> Float[Tensor, "*B n C"]:
        """Sum values of segments for each node."""
        nothing = x.new_zeros(*x.shape[:-2], len(self.place), x.shape[-1])
        return nothing.index_add(-2, self.to, x)

    def smallest(self, x: Float[Tensor, "*B S C"]) -> Float[Tensor, "*B n C"]:
        """Compute the minimum over segments for each node; infinity if it has none."""
        return self._placed(x, math.inf).amin(-2)

    def largest(self, x: Float[Tensor, "*B S C"]) -> Float[Tensor, "*B n C"]:
        """Compute the maximum over segments for each node; minus infinity if it has none."""
        return self._placed(x, -math.inf).amax(-2)

    def _placed(self, x: Float[Tensor, "*B S C"], nothing: float) -> Float[Tensor, "*B n most C"]:
        row = x.new_full((*x.shape[:-2], 1, x.shape[-1]), nothing)
        rows = torch.cat([x, row], dim=-2)
        return rows.index_select(-2, self.place.flatten()).unflatten(-2, self.place.shape)


def arrivals_of(to: Int64[Tensor, " S"], lengths: Int64[Tensor, " S"], nodes: int) -> Arrivals:
    """Build arrivals from the node that each segment leads to and its number of directed edges."""
    segments = torch.bincount(to, minlength=nodes)
    node, slot = counted(segments)
    most = int(segments.max()) if len(to) else 0
    place = torch.full((nodes, most + 1), len(to), device=to.device)
    place[node, slot] = to.argsort(stable=True)
    degree = torch.zeros(nodes, device=to.device).index_add_(0, to, lengths.float())
    return Arrivals(to, place, degree)


def counted(counts: Int64[Tensor, " k"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """List the items of k owners, ``counts`` of each: their owner and their index there."""
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - first[owner]
