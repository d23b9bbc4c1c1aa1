"""NG-T: a relational transformer over neurons (Kofinas et al. 2024, section 3.2).

Attention whose queries, keys and values the edges modulate, and edges that are updated from
their two nodes (Diao & Loynd 2023). Every edge is walked both ways and has a state for
each: plane 0 is the forward edge source -> target, plane 1 its reverse.

A pair without an edge, a node and itself among them, has edge state 0. The edges' projections
have no bias, so its value is 0 as well: such a pair takes weight away from the others and carries
nothing. That leaves a sum of scores to work out for it, and no state to store.

With ``plain`` such a pair carries the other node's value, and an edge modulates that: then a few
rounds are enough to see all of a deep network from each of its nodes. Predictors of accuracy are
of this kind, the optimizer and models that read INRs are not.
"""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Chunk, Topology, with_edges
from l2o_graph.layout.edges import LazyEdges, over_planes
from l2o_graph.layout.node_ranges import split_ranges
from l2o_graph.layout.partials import SoftmaxPartial

# Up to so many pairs of nodes, those without an edge are attended to as well: 1024 nodes, whose
# scores take 4 MB a head.
MOST_PAIRS = 2**20


class PostNorm(nn.Module):
    """x <- LN(x + update), then x <- LN(x + FFN(x)), with dropout of both that are added."""

    def __init__(self, size: int, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.ffn = nn.Sequential(
            nn.Linear(size, hidden, bias=False), nn.GELU(), nn.Linear(hidden, size)
        )
        self.ffn_norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*n C"], update: Float[Tensor, "*n C"]) -> Tensor:
        """Take an update."""
        x = self.norm(x + self.dropout(update))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class NodeUpdate(nn.Module):
    """Attention of every node to its pairs, and the node update.

    For node i and the edge j -> i with state e, D = ``attention`` channels of all heads, and p = 1
    with ``plain``, otherwise 0::

        Q = q_i + W_q e,  K = k_j + W_k e,  V = (p + W_s e) * v_j + W_v e
        o_i = sum over j of softmax_j(<Q, K> / sqrt(D)) V
        x_i <- PostNorm(x_i, W_0 W_out o_i),  with ``axial`` PostNorm(x_i, W_0 o_i)
    """

    def __init__(
        self,
        node: int,
        edge: int,
        attention: int,
        heads: int,
        hidden: int,
        axial: bool,
        dropout: float,
        plain: bool,
    ):
        super().__init__()
        self.heads, self.plain = heads, plain
        self.averaged = edge if axial else 0  # channels of the edges whose means are asked for
        self.scale = attention**-0.5
        self.of_node = nn.Linear(node, 3 * attention, bias=False)  # q, k, v
        self.of_edge = nn.Linear(edge, 4 * attention, bias=False)  # W_q, W_k, W_s, W_v
        out = [nn.Linear(attention, node)]
        self.out = nn.Sequential(*out if axial else [*out, nn.Linear(node, node)])
        self.post = PostNorm(node, hidden, dropout)

    def gather(
        self,
        topology: Topology,
        chunks: Sequence[Chunk],
        nodes: Float[Tensor, "*B N H"],
        edges: LazyEdges,
        joined: Sequence[Bool[Tensor, "_ _"] | None],
    ) -> SoftmaxPartial:
        """Let all nodes attend, along the edges of the chunks and to pairs without one.

        ``joined`` says for each network which of its pairs to leave to the edges; without it there
        are no pairs but theirs. Sums of edges are of no channels without ``axial``.
        """
        # Channels first: heads are short, and the rows of a grid are what is long.
        of_node = (self.of_node.weight @ nodes.mT).unflatten(-2, (3, self.heads, -1))
        queries, keys, values = of_node.unbind(-4)  # (*B, heads, d, N) each
        alone = [
            self._alone(
                queries[..., start:stop], keys[..., start:stop], values[..., start:stop], left_out
            )
            for (start, stop), left_out in zip(topology.networks, joined, strict=True)
        ]
        log_mass, mean = (torch.cat(x, dim=-1) for x in zip(*alone, strict=True))
        *batch, count, _ = nodes.shape
        no_edge = nodes.new_zeros(*batch, 2, count, self.averaged)
        begin = SoftmaxPartial(log_mass, mean, no_edge)

        def sides() -> Iterator[SoftmaxPartial]:
            for chunk in chunks:
                states = edges(chunk)
                for block, own in with_edges(chunk):
                    groups, rows, columns = block.grid
                    to_rows = int(block.from_rows)  # the plane of edges that lead there
                    grid = states[..., own, : self.averaged].unflatten(-2, block.grid)
                    planes = states[..., own, :].unbind(-3)
                    into_rows, into_columns = planes[to_rows], planes[1 - to_rows]
                    row_q, row_k, row_v = (
                        x[..., slice(*block.rows)].unflatten(-1, (groups, rows, 1))
                        for x in (queries, keys, values)
                    )
                    col_q, col_k, col_v = (
                        x[..., slice(*block.columns)].unflatten(-1, (groups, 1, columns))
                        for x in (queries, keys, values)
                    )
                    into = self._attend(row_q, col_k, col_v, into_rows, block.grid, dim=-1)
                    back = self._attend(col_q, row_k, row_v, into_columns, block.grid, dim=-2)
                    # A plane's edges lead to one side and leave the other.
                    of_rows, of_columns = (grid.sum(dim).flatten(-3, -2) for dim in (-2, -3))
                    yield SoftmaxPartial(*into, of_rows.flip(-3) if to_rows else of_rows)
                    yield SoftmaxPartial(*back, of_columns if to_rows else of_columns.flip(-3))

        ranges = tuple(side for chunk in chunks for p in chunk for side in (p.rows, p.columns))
        parts = split_ranges(ranges, topology.spec.num_nodes)
        before = [begin.part(*run) for run in parts.nodes]
        reached = parts.merge_all(sides(), before)
        return SoftmaxPartial.cat([each for each in reached if each is not None])

    def _alone(
        self,
        queries: Float[Tensor, "*B heads d n"],
        keys: Float[Tensor, "*B heads d n"],
        values: Float[Tensor, "*B heads d n"],
        joined: Bool[Tensor, "n n"] | None,
    ) -> tuple[Float[Tensor, "*B heads n"], Float[Tensor, "*B heads d n"]]:
        """Log mass and mean value of the pairs without an edge, a node and itself among them."""
        if joined is None:
            log_mass = self.scale * (queries * keys).sum(-2)
            return log_mass, values if self.plain else torch.zeros_like(values)
        scores = (self.scale * (queries.mT @ keys)).masked_fill(joined, -torch.inf)
        log_mass = scores.logsumexp(-1)
        if not self.plain:
            return log_mass, torch.zeros_like(values)
        return log_mass, values @ (scores - log_mass.unsqueeze(-1)).exp().mT

    def _attend(
        self,
        queries: Float[Tensor, "*B heads d groups _ _"],
        keys: Float[Tensor, "*B heads d groups _ _"],
        values: Float[Tensor, "*B heads d groups _ _"],
        edges: Float[Tensor, "*B E C"],
        grid: tuple[int, int, int],
        dim: int,
    ) -> tuple[Float[Tensor, "*B heads n"], Float[Tensor, "*B heads d n"]]:
        """Log mass and mean of the values along the rows or the columns of a grid."""
        # Four products rather than one in four parts, whose gradients would have to be put
        # together: a copy that took a sixth of a step.
        batch, flat = edges.shape[:-2], edges.reshape(-1, *edges.shape[-2:])
        on_query, on_key, scale, shift = (
            torch.bmm(weight.expand(len(flat), -1, -1), flat.mT).view(*batch, self.heads, -1, *grid)
            for weight in self.of_edge.weight.chunk(4)
        )
        if self.plain:
            scale = 1 + scale
        scores = self.scale * ((queries + on_query) * (keys + on_key)).sum(-4)
        log_mass = scores.logsumexp(dim)
        weights = (scores - log_mass.unsqueeze(dim)).exp()
        mean = (weights.unsqueeze(-4) * torch.addcmul(shift, scale, values)).sum(dim)
        return log_mass.flatten(-2), mean.flatten(-2)

    def forward(
        self, nodes: Float[Tensor, "*B N H"], gathered: SoftmaxPartial
    ) -> Float[Tensor, "*B N H"]:
        """Update the nodes from what they gathered."""
        return self.post(nodes, self.out(gathered.mean.flatten(-3, -2).mT))


class EdgeUpdate(nn.Module):
    """The edge update, from the nodes that the layer made.

    For the edge j -> i with state e and the state e' of its reverse::

        h = GELU(W_edge [e; e'] + W_source x_j + W_target x_i + a),  e <- PostNorm(e, W_out h)

    with ``axial`` a = W_column (mean of the edges that leave j) + W_row (mean of those that lead
    to i), otherwise a = 0.
    """

    def __init__(self, node: int, edge: int, hidden: int, axial: bool, dropout: float):
        super().__init__()
        inner = edge if axial else hidden
        self.edge = nn.Linear(2 * edge, inner)
        self.source = nn.Linear(node, inner)
        self.target = nn.Linear(node, inner)
        self.column = nn.Linear(edge, inner, bias=False) if axial else None
        self.row = nn.Linear(edge, inner, bias=False) if axial else None
        self.out = nn.Linear(inner, edge)
        self.post = PostNorm(edge, hidden, dropout)

    def terms(
        self, topology: Topology, nodes: Float[Tensor, "*B N H"], gathered: SoftmaxPartial
    ) -> tuple[Float[Tensor, "*B N inner"], Float[Tensor, "*B N inner"]]:
        """What each node adds to the edges that lead to it and to those that leave it."""
        target, source = self.target(nodes), self.source(nodes)
        if self.row is not None and self.column is not None:
            # A node without edges has no one to tell, but 0 / 0 would spoil the gradient.
            degree = topology.degree.to(nodes).clamp(min=1)[:, None]
            into, out_of = (gathered.edges / degree).unbind(-3)
            target, source = target + self.row(into), source + self.column(out_of)
        return target, source

    def forward(
        self,
        chunk: Chunk,
        terms: tuple[Float[Tensor, "*B N inner"], Float[Tensor, "*B N inner"]],
        edges: Float[Tensor, "*B 2 E C"],
    ) -> Float[Tensor, "*B 2 E C"]:
        """Update the edges of a chunk."""
        both = torch.cat([edges, edges.flip(-3)], dim=-1)
        hidden = nn.functional.gelu(self.edge(both) + over_planes(chunk, *terms))
        return self.post(edges, self.out(hidden))


class NGTLayer(nn.Module):
    """One round of attention: a node update and an edge update, Xavier weights and zero biases.

    Args:
        node: Channels of nodes.
        edge: Channels of edges.
        attention: Channels of queries, keys and values, all heads together.
        heads: Heads that share them.
        node_hidden: Hidden channels of the nodes' feed-forward network.
        edge_hidden: Hidden channels of the edges' networks.
        axial: The layer whose size is that of the paper's models, where the released code's is
            not: the attention has no output map of its own, and an edge also reads the means of
            the edges that share one of its ends.
        dropout: Share of what is added to a state's channels that training leaves out.
        edges: Whether edges are updated; without, the layer has no weights for it.
        plain: Whether p = 1 in ``NodeUpdate``: values are those of a plain transformer where there
            is no edge, and modulated by it where there is one.

    Raises:
        ValueError: When the heads do not share the attention's channels evenly.
    """

    def __init__(
        self,
        node: int,
        edge: int,
        attention: int,
        heads: int,
        node_hidden: int,
        edge_hidden: int,
        axial: bool = False,
        dropout: float = 0.0,
        edges: bool = True,
        plain: bool = False,
    ):
        if attention % heads:
            raise ValueError(f"expected a multiple of {heads} heads, found {attention} channels")
        super().__init__()
        self.node = NodeUpdate(node, edge, attention, heads, node_hidden, axial, dropout, plain)
        self.edge = EdgeUpdate(node, edge, edge_hidden, axial, dropout) if edges else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        topology: Topology,
        chunks: Sequence[Chunk],
        nodes: Float[Tensor, "*B N H"],
        edges: LazyEdges,
        joined: Sequence[Bool[Tensor, "_ _"] | None],
    ) -> tuple[Float[Tensor, "*B N H"], LazyEdges]:
        """Update the nodes, and say how to update the edges of a chunk."""
        gathered = self.node.gather(topology, chunks, nodes, edges, joined)
        nodes, update = self.node(nodes, gathered), self.edge
        if update is None:
            return nodes, edges
        terms = update.terms(topology, nodes, gathered)
        return nodes, lambda chunk: update(chunk, terms, edges(chunk))


class NGT(nn.Module):
    """NG-T: node and edge states in, node and edge states out.

    A node attends to its neighbours along the edges that lead to it, of both planes, and to
    itself; up to ``most_pairs`` pairs, also to all nodes that it has no edge with. The released
    code has a state for every pair of nodes, which without an edge starts at a constant and is
    updated like any other, and a node attends along the edges that leave it; here states live on
    edges alone, a pair without one carries nothing, or with ``plain`` the other node's value, and
    means over edges (``axial``) are over those there are.

    Left out on purpose: the class token and the attention to padding of the released code, which
    made a network's answer depend on more than the network.

    Args, beside those of ``NGTLayer``, whose sizes are ``hidden`` unless said otherwise:
        hidden: Channels of nodes; half of the nodes' feed-forward network's.
        layers: Rounds of attention.
        most_pairs: Most pairs of nodes, N * N, for which all are attended to.
        last_edges: Whether the last layer updates edges, as all others do.

    The paper's optimizer has ``NGT(32, 2, 4, edge_hidden=64, axial=True)`` by its size.
    """

    def __init__(
        self,
        hidden: int = 32,
        layers: int = 2,
        heads: int = 4,
        edge_hidden: int | None = None,
        axial: bool = False,
        most_pairs: int = MOST_PAIRS,
        edge: int | None = None,
        attention: int | None = None,
        dropout: float = 0.0,
        last_edges: bool = True,
        plain: bool = False,
    ):
        super().__init__()
        self.most_pairs = most_pairs
        edge, attention, edge_hidden = edge or hidden, attention or hidden, edge_hidden or hidden
        sizes = (hidden, edge, attention, heads, 2 * hidden, edge_hidden, axial, dropout)
        self.layers = nn.ModuleList(
            NGTLayer(*sizes, edges=last_edges or k < layers - 1, plain=plain) for k in range(layers)
        )

    def forward(
        self,
        topology: Topology,
        chunks: Sequence[Chunk],
        nodes: Float[Tensor, "*B N H"],
        edges: LazyEdges,
        last: Sequence[Chunk] | None = None,
    ) -> tuple[Float[Tensor, "*B N H"], LazyEdges]:
        """Attend; arguments and answers are those of ``NGGNN``, edge states (*B, 2, E, C)."""
        edges = cache(edges)
        joined = [
            pairs if pairs is None else pairs.to(nodes.device)
            for pairs in joined_pairs(topology, self.most_pairs)
        ]
        for k, layer in enumerate(self.layers, 1):
            attended = chunks if last is None or k < len(self.layers) else last
            nodes, updated = layer(topology, attended, nodes, edges, joined)
            edges = cache(updated)
        return nodes, edges


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def joined_pairs(topology: Topology, most: int) -> list[Bool[Tensor, "_ _"] | None]:
    """For each network which pairs of its nodes have an edge; None where it has too many pairs.

    A node and itself never have one, so that each row has a gap.
    """
    answer: list[Tensor | None] = [
        torch.zeros(stop - start, stop - start, dtype=torch.bool)
        if (stop - start) ** 2 <= most
        else None
        for start, stop in topology.networks
    ]
    for block, kernel in zip(topology.blocks, topology.spec.kernels, strict=True):
        network = topology.spec.neurons[kernel.source].network
        joined, first = answer[network], topology.networks[network][0]
        if joined is None:
            continue
        groups, rows, columns = block.grid
        row = torch.arange(*block.rows).view(groups, rows, 1) - first
        column = torch.arange(*block.columns).view(groups, 1, columns) - first
        joined[row, column] = joined[column, row] = True
    return [None if joined is None else joined.fill_diagonal_(False) for joined in answer]
