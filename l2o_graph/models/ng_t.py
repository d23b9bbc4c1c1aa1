"""NG-T: a relational transformer over neurons (Kofinas et al. 2024, section 3.2).

Attention whose queries, keys and values the edges modulate, and edges that are updated from
their two nodes (Diao & Loynd 2023). Every edge is walked both ways and has a state for each; where
edges lie is another's matter, as for ``ng_gnn``.

A pair without an edge, a node and itself among them, has edge state 0. The edges' projections
have no bias, so its value is 0 as well: such a pair takes weight away from the others and carries
nothing. That leaves a sum of scores to work out for it, and no state to store.

With ``plain`` such a pair carries the other node's value, and an edge modulates that: then a few
rounds are enough to see all of a deep network from each of its nodes. Predictors of accuracy are
of this kind, the optimizer and models that read INRs are not.
"""

from collections.abc import Iterable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.pairs import Pairs
from l2o_graph.models.attention import Attention
from l2o_graph.models.ng_gnn import Route, Walk

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
    """The node update, from what attention gathers: see ``Attention``.

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
        self.of_node = nn.Linear(node, 3 * attention, bias=False)  # q, k, v
        self.of_edge = nn.Linear(edge, 4 * attention, bias=False)  # W_q, W_k, W_s, W_v
        out = [nn.Linear(attention, node)]
        self.out = nn.Sequential(*out if axial else [*out, nn.Linear(node, node)])
        self.post = PostNorm(node, hidden, dropout)

    def forward(
        self,
        walk: Walk,
        pairs: Pairs,
        nodes: Float[Tensor, "*B N H"],
        edges: Sequence[Float[Tensor, "... C"]],
    ) -> Float[Tensor, "*B n H"]:
        """Let nodes attend, along edges and to ``pairs`` without one, and update them."""
        attention = Attention(self.of_edge.weight, self.heads, self.plain)
        of_nodes = self.of_node(nodes).chunk(3, dim=-1)
        return self.post(walk.own(nodes), self.out(attention(walk, pairs, of_nodes, edges)))


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

    def forward(
        self,
        route: Route,
        nodes: Float[Tensor, "*B N H"],
        edges: Sequence[Float[Tensor, "... C"]],
        last: bool,
    ) -> list[Float[Tensor, "... C"]]:
        """Update all edges, or those of the last round."""
        target, source = self.target(nodes), self.source(nodes)
        if self.row is not None and self.column is not None:
            # A node without edges has no one to tell, but 0 / 0 would spoil the gradient.
            degree = route.all.arrivals.degree.to(nodes).clamp(min=1)[:, None]
            into, out_of = (route.sums(edges) / degree).unbind(-3)
            target, source = target + self.row(into), source + self.column(out_of)
        walk, own = (route.last, route.kept(edges)) if last else (route.all, edges)
        answer = []
        both = route.paired(edges, last)
        for states, pair, terms in zip(own, both, walk.spread(target, source), strict=True):
            hidden = nn.functional.gelu(self.edge(pair) + terms)
            answer.append(self.post(states, self.out(hidden)))
        return answer


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
        plain: Whether p = 1 in ``Attention``: values are those of a plain transformer where there
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
        route: Route,
        nodes: Float[Tensor, "*B N H"],
        edges: Sequence[Float[Tensor, "... C"]],
    ) -> tuple[Float[Tensor, "*B n H"], Iterable[Float[Tensor, "... C"]]]:
        """Attend; arguments and answers are those of ``NGGNN``, with edges walked both ways."""
        pairs, update = route.unjoined(self.most_pairs), None
        for k, layer in enumerate(self.layers, 1):
            assert isinstance(layer, NGTLayer)
            last = k == len(self.layers)
            if update is not None:  # edges are updated where they are read next
                edges = update(route, nodes, edges, last)
            elif last:
                edges = route.kept(edges)
            nodes = layer.node(route.last if last else route.all, pairs, nodes, edges)
            update = layer.edge
        return nodes, edges if update is None else update(route, nodes, edges, last=False)
