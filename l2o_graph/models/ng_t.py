"""NG-T: a relational transformer over neurons (Kofinas et al. 2024, section 3.2).

Attention whose queries, keys and values are modulated by edges, and edges that are updated from
their two nodes (Diao & Loynd 2023). Every edge has a state for each of its two directions. Edges
are laid out as for ``ng_gnn``.

A pair without an edge, also that of a node and itself, has edge state 0. Projections of edges have
no bias, so the value of such a pair is 0, too: it only takes attention weight from the others. So
only its score has to be computed, and it has no state to store.

With ``plain`` the value of such a pair is that of the other node, and edges modulate values. A node
of a deep network then sees all others within a few layers. Predictors of accuracy are of this kind;
the optimizer and models that read INRs are not.
"""

from collections.abc import Iterable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.pairs import Pairs
from l2o_graph.models.attention import Attention
from l2o_graph.models.ng_gnn import Route, Walk

# Up to this many pairs of nodes, pairs without an edge are attended to as well: 1024 nodes, whose
# scores take 4 MB per head.
MOST_PAIRS = 2**20


class PostNorm(nn.Module):
    """Post-norm residuals: x <- LN(x + update), then x <- LN(x + FFN(x)), with dropout."""

    def __init__(self, size: int, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.ffn = nn.Sequential(
            nn.Linear(size, hidden, bias=False), nn.GELU(), nn.Linear(hidden, size)
        )
        self.ffn_norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*n C"], update: Float[Tensor, "*n C"]) -> Tensor:
        """Apply an update."""
        x = self.norm(x + self.dropout(update))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class NodeUpdate(nn.Module):
    """Update of nodes from the output o_i of ``Attention``.

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
        """Let nodes attend along edges and to ``pairs`` without an edge, and update them."""
        attention = Attention(self.of_edge.weight, self.heads, self.plain)
        of_nodes = self.of_node(nodes).chunk(3, dim=-1)
        return self.post(walk.own(nodes), self.out(attention(walk, pairs, of_nodes, edges)))


class EdgeUpdate(nn.Module):
    """Update of edges from the nodes of the same layer.

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
        """Update all edges, or those of the last layer."""
        target, source = self.target(nodes), self.source(nodes)
        if self.row is not None and self.column is not None:
            # For a node without edges the mean is not used, but 0 / 0 would spoil the gradient.
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
    """A layer of NG-T: an update of nodes and one of edges, Xavier weights and zero biases.

    Args:
        node: Number of channels of nodes.
        edge: Number of channels of edges.
        attention: Number of channels of queries, keys and values, all heads together.
        heads: Number of heads, which divide these channels.
        node_hidden: Number of hidden channels of the nodes' feed-forward network.
        edge_hidden: Number of hidden channels of the edges' networks.
        axial: Whether the layer is the variant whose size matches the paper's models, other than
            the released code: the attention has no output map of its own, and an edge also reads
            the means of the edges that share one of its ends.
        dropout: Dropout rate of the updates.
        edges: Whether edges are updated; otherwise the layer has no weights for them.
        plain: Whether p = 1 in ``Attention``: values are those of a plain transformer for pairs
            without an edge, and modulated by the edge for others.

    Raises:
        ValueError: If the number of heads does not divide the attention's channels.
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
    """NG-T: maps node and edge states to node and edge states.

    A node attends to its neighbours along the edges of both directions that lead to it, and to
    itself; up to ``most_pairs`` pairs, also to all nodes that it has no edge with.

    Differences from the released code: That has a state for every pair of nodes, also without an
    edge, and a node attends along the edges that leave it. Here only edges have states, the value
    of a pair without an edge is 0 (or with ``plain`` that of the other node), and means over edges
    (``axial``) are over existing ones. There is no class token and no attention to padding, which
    made a network's result depend on more than the network.

    Args, beside those of ``NGTLayer``, whose sizes are ``hidden`` by default:
        hidden: Number of channels of nodes; half as many as in their feed-forward network.
        layers: Number of layers.
        most_pairs: Largest number of pairs of nodes, N * N, up to which all are attended to.
        last_edges: Whether the last layer updates edges, too.

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
        """Apply all layers; arguments and results as for ``NGGNN``, with edges both ways."""
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
