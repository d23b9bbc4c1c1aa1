"""Attention of NG-T, along edges in grids or segments and to nodes without an edge.

For node i and the edge j -> i with state e, with D channels of all heads, and p = 1 with ``plain``,
otherwise 0::

    Q = q_i + W_q e,  K = k_j + W_k e,  V = (p + W_s e) * v_j + W_v e
    o_i = sum over j of softmax_j(<Q, K> / sqrt(D)) V

A segment S of directed edges contributes its highest score t, its mass, which is the sum of
exp(score - t), and the sum of values with these weights. Nodes combine segments as in online
softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from l2o_graph.layout.grids import Grids
from l2o_graph.layout.pairs import Pairs
from l2o_graph.layout.segments import Segments

# Of segments (*B, S, heads), (*B, S, heads) and (*B, S, D).
Partial = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention by the equations above, with of_edge = [W_q; W_k; W_s; W_v], (4D, C)."""

    of_edge: Float[Tensor, "four_D C"]
    heads: int
    plain: bool

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return (len(self.of_edge) // 4) ** -0.5

    def by_head(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n heads d"]:
        """Split channels by heads."""
        return x.unflatten(-1, (self.heads, -1))

    def __call__(
        self,
        walk: Grids | Segments,
        pairs: Pairs,
        of_nodes: Sequence[Float[Tensor, "*B N D"]],
        edges: Sequence[Float[Tensor, "... C"]],
    ) -> Float[Tensor, "*B n D"]:
        """Compute o_i of each receiving node, from q, k and v of all nodes and states of edges."""
        if isinstance(walk, Grids):
            top, mass, total = self.over_grids(walk, of_nodes, edges)
        else:
            top, mass, total = self.over_segments(walk, of_nodes, edges)
        alone, plain = (walk.own(x) for x in self.alone(pairs, *of_nodes))
        # One softmax over pairs of both kinds, relative to the highest so that nothing overflows.
        arrivals = walk.arrivals
        highest = torch.maximum(arrivals.largest(top), alone.detach())
        share, others = (top - highest.index_select(-2, arrivals.to)).exp(), (alone - highest).exp()
        mass = arrivals.added(share * mass) + others
        total = (share[..., None] * self.by_head(total)).flatten(-2)
        gathered = self.by_head(arrivals.added(total))
        if self.plain:
            gathered = torch.addcmul(gathered, others[..., None], self.by_head(plain))
        return (gathered / mass[..., None]).flatten(-2)

    def alone(
        self,
        pairs: Pairs,
        queries: Float[Tensor, "*B N D"],
        keys: Float[Tensor, "*B N D"],
        values: Float[Tensor, "*B N D"],
    ) -> tuple[Float[Tensor, "*B N heads"], Float[Tensor, "*B N D"]]:
        """Compute log mass and mean value of each node's pairs without an edge.

        Their edge state is 0. In networks with too many pairs, only the pair of a node and itself
        counts.
        """
        itself = self.scale * self.by_head(queries * keys).sum(-1)
        query, key, value = (
            self.by_head(x.index_select(-2, pairs.place.flatten()))
            .unflatten(-3, pairs.place.shape)
            .transpose(-3, -2)
            for x in (queries, keys, values)
        )  # (*B, I, heads, most, d)
        scores = self.scale * (query @ key.mT)
        scores = scores.masked_fill(pairs.left_out[:, None], -torch.inf)
        masses = scores.logsumexp(-1)
        found = masses.transpose(-2, -1).flatten(-3, -2).index_select(-2, pairs.inside)
        mass = itself.index_copy(-2, pairs.nodes, found)
        if not self.plain:
            return mass, values
        means = ((scores - masses[..., None]).exp() @ value).transpose(-3, -2).flatten(-2)
        found = means.flatten(-3, -2).index_select(-2, pairs.inside)
        return mass, values.index_copy(-2, pairs.nodes, found)

    def over_segments(
        self,
        segments: Segments,
        of_nodes: Sequence[Float[Tensor, "N D"]],
        edges: Sequence[Float[Tensor, "... C"]],
    ) -> Partial:
        """Attend along directed edges in segments."""
        (states,), (queries, keys, values) = edges, of_nodes
        on_query, on_key, scale, shift = (F.linear(states, w) for w in self.of_edge.chunk(4))
        query = segments.over(on_query, queries.index_select(0, segments.target))
        key = on_key + keys.index_select(0, segments.source)
        scale = 1 + scale if self.plain else scale
        value = torch.addcmul(shift, scale, values.index_select(0, segments.source))
        scores = self.scale * self.by_head(query * key).sum(2)
        top = torch.cat([grid.amax(1) for grid in segments.grids(scores.detach())])
        weights = segments.over(scores, -top).exp()
        total = segments.sums(weights[:, :, None] * self.by_head(value))
        return top, segments.sums(weights), total.flatten(1)

    def over_grids(
        self,
        grids: Grids,
        of_nodes: Sequence[Float[Tensor, "*B N D"]],
        edges: Sequence[Float[Tensor, "... C"]],
    ) -> Partial:
        """Attend along the rows and the columns of grids."""
        # Channels first, because heads are short and rows of a grid are long.
        first = [x.mT.contiguous().unflatten(-2, (self.heads, -1)) for x in of_nodes]
        found = []
        for block, states in grids.blocks(edges):
            groups, rows, columns = block.grid
            row = [x[..., slice(*block.rows)].unflatten(-1, (groups, rows, 1)) for x in first]
            column = [
                x[..., slice(*block.columns)].unflatten(-1, (groups, 1, columns)) for x in first
            ]
            along = (column, row, -2), (row, column, -1)
            planes = along if block.from_rows else along[::-1]
            for (target, source, dim), plane in zip(planes, states.unbind(-3), strict=True):
                ends = target[0], source[1], source[2]
                found.append(self._attend(*ends, plane, block.grid, dim))
        top, mass, total = (torch.cat(x, dim=-2) for x in zip(*found, strict=True))
        return top, mass, total

    def _attend(
        self,
        queries: Float[Tensor, "*B heads d groups _ _"],
        keys: Float[Tensor, "*B heads d groups _ _"],
        values: Float[Tensor, "*B heads d groups _ _"],
        edges: Float[Tensor, "*B E C"],
        grid: tuple[int, int, int],
        dim: int,
    ) -> Partial:
        """Attend along the rows or the columns of one grid."""
        # Four products instead of one split in four parts, whose gradients would have to be
        # concatenated: that copy took a sixth of a step.
        batch, flat = edges.shape[:-2], edges.reshape(-1, *edges.shape[-2:])
        on_query, on_key, scale, shift = (
            torch.bmm(weight.expand(len(flat), -1, -1), flat.mT).view(*batch, self.heads, -1, *grid)
            for weight in self.of_edge.chunk(4)
        )
        scale = 1 + scale if self.plain else scale
        scores = self.scale * ((queries + on_query) * (keys + on_key)).sum(-4)
        top = scores.detach().amax(dim, keepdim=True)
        weights = (scores - top).exp()
        total = (weights.unsqueeze(-4) * torch.addcmul(shift, scale, values)).sum(dim)
        top, mass = top.squeeze(dim).flatten(-2).mT, weights.sum(dim).flatten(-2).mT
        return top, mass, total.flatten(-2).flatten(-3, -2).mT
