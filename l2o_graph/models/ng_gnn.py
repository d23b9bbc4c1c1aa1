"""NG-GNN: a message-passing network over neurons (Kofinas et al. 2024, section 3.2).

PNA aggregation (Corso et al. 2020) of messages that edges modulate as in FiLM (Perez et al. 2018),
and edges that are updated from their two nodes. Edges are laid out in grids, for networks of one
architecture (``GridRoute``), or in segments, for a batch of any (``DirectedEdges``). In both,
directed edges come in parts, each with its states in one tensor.

Axes: E directed edges of a part, S segments, n of N nodes that receive; *B as in ``layout.grids``.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.arrivals import Arrivals
from l2o_graph.layout.grids import GridRoute, Grids
from l2o_graph.layout.segments import DirectedEdges, Segments

Route = GridRoute | DirectedEdges
Walk = Grids | Segments

# PyTorch Geometric's floor for variances; at or below it the standard deviation is set to 0.
SMALLEST_VARIANCE = 1e-5


class GraphNorm(nn.Module):
    """Layer normalisation over all nodes and channels of a graph, with a scale and shift a channel.

    This is PyTorch Geometric's LayerNorm in graph mode. The released code called it without the
    assignment of nodes to graphs, so a graph's result depended on the others in its batch.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Float[Tensor, "*B N H"], route: Route) -> Float[Tensor, "*B N H"]:
        """Normalise the nodes of each graph separately."""
        centred = x - route.mean(x)
        deviation = (route.mean(centred.square()) + 1e-10).sqrt()
        return centred / (deviation + 1e-5) * self.weight + self.bias


def pna(
    arrivals: Arrivals,
    sums: Float[Tensor, "*B S two_H"],
    low: Float[Tensor, "*B S H"],
    high: Float[Tensor, "*B S H"],
) -> Float[Tensor, "*B n four_H"]:
    """Compute mean, minimum, maximum and standard deviation of each node's messages.

    They are combined from the sums, sums of squares, minima and maxima of segments. Nodes without
    messages get zeros.
    """
    count = arrivals.degree.to(sums).clamp(min=1)[:, None]
    mean, square = (arrivals.added(sums) / count).chunk(2, dim=-1)
    variance = (square - mean * mean).clamp(min=SMALLEST_VARIANCE)
    deviation = variance.sqrt().masked_fill(variance <= SMALLEST_VARIANCE, 0.0)
    found = [mean, arrivals.smallest(low), arrivals.largest(high), deviation]
    return torch.cat(found, dim=-1).masked_fill((arrivals.degree == 0)[:, None], 0)


class NGGNNLayer(nn.Module):
    """One round of messages, node updates and edge updates.

    For the edge j -> i with state e, and F = ``hidden`` channels::

        (s, t) = W_film e
        m_ji   = s * W_message [v_i; v_j] + t
        a_i    = [mean, min, max, std](m_ji over j), and the same times log(deg_i + 1) / delta
        u_i    = W_mix W_node [v_i; a_i]
        e_ji  <- W_out SiLU(W_edge e_ji + W_source v_j + W_target v_i)

    Edges are next read by another linear map, which is fused with W_out: e is passed on as
    SiLU(..), and W_out as ``before``.

    Args:
        hidden: Number of channels, F.
        delta: Mean of log(degree + 1), by which the amplification is divided.
        edges: Whether edges are updated; otherwise the layer has no weights for them.
    """

    def __init__(self, hidden: int, delta: float, edges: bool = True):
        super().__init__()
        self.delta = delta
        self.film = nn.Linear(hidden, 2 * hidden)
        self.message = nn.Linear(2 * hidden, hidden)
        self.node = nn.Linear(9 * hidden, hidden)
        self.mix = nn.Linear(hidden, hidden)
        if edges:
            self.edge = nn.Linear(hidden, hidden)
            self.source = nn.Linear(hidden, hidden)
            self.target = nn.Linear(hidden, hidden)
            self.out = nn.Linear(hidden, hidden)

    def messages(
        self,
        walk: Walk,
        nodes: Float[Tensor, "*B N H"],
        edges: Sequence[Float[Tensor, "... H"]],
        before: nn.Linear | None = None,
    ) -> Iterator[Float[Tensor, "... H"]]:
        """Yield the messages m_ji of each part."""
        of_target, of_source = self.message.weight.chunk(2, dim=1)
        target_term = nodes @ of_target.T + self.message.bias
        # Two maps instead of one split in halves, whose gradients would have to be concatenated.
        halves = zip(self.film.weight.chunk(2), self.film.bias.chunk(2), strict=True)
        maps = [_fused(before, *half) for half in halves]
        spread = walk.spread(target_term, nodes @ of_source.T)
        for states, terms in zip(edges, spread, strict=True):
            scale, shift = (nn.functional.linear(states, *each) for each in maps)
            yield torch.addcmul(shift, scale, terms)

    def next_nodes(
        self,
        walk: Walk,
        nodes: Float[Tensor, "*B N H"],
        edges: Sequence[Float[Tensor, "... H"]],
        before: nn.Linear | None = None,
    ) -> Float[Tensor, "*B n H"]:
        """Aggregate the messages of all parts and update the nodes."""
        arrivals = walk.arrivals
        gathered = pna(arrivals, *walk.tallied(self.messages(walk, nodes, edges, before)))
        amplification = torch.log(arrivals.degree.to(nodes) + 1)[:, None] / self.delta
        received = torch.cat([walk.own(nodes), gathered, gathered * amplification], dim=-1)
        return self.mix(self.node(received))

    def next_edges(
        self,
        walk: Walk,
        nodes: Float[Tensor, "*B N H"],
        edges: Sequence[Float[Tensor, "... H"]],
        before: nn.Linear | None = None,
    ) -> list[Float[Tensor, "... H"]]:
        """Update edges from this layer's nodes, except for W_out."""
        own = _fused(before, self.edge.weight, self.edge.bias)
        spread = walk.spread(self.target(nodes), self.source(nodes))
        return [
            nn.functional.silu(nn.functional.linear(states, *own) + terms)
            for states, terms in zip(edges, spread, strict=True)
        ]


def _fused(before: nn.Linear | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Fuse a linear map with the one before it; return weight and bias."""
    if before is None:
        return weight, bias
    return weight @ before.weight, torch.addmv(bias, weight, before.bias)


@torch.no_grad()
def keep_nodes(model: "NGGNN") -> None:
    """Initialise a model so that a node's own state outweighs its messages.

    W_mix and the part of W_node that reads the node itself become orthogonal. NG-GNN has no
    residuals, and with torch's own initialisation only 1 weight in 9 reads the node: after four
    rounds nothing is left of its features, such as its activation or its responses to probes.
    The paper's optimizer keeps torch's initialisation, with which its checkpoints were trained.
    """
    for layer in model.layers:
        assert isinstance(layer, NGGNNLayer)
        hidden = layer.mix.out_features
        nn.init.orthogonal_(layer.mix.weight)
        nn.init.orthogonal_(layer.node.weight[:, :hidden])


class NGGNN(nn.Module):
    """NG-GNN: maps node and edge states to node and edge states (equations above).

    Args:
        hidden: Number of channels of nodes and edges.
        layers: Number of layers. Nodes are normalised and activated after all but the last.
        delta: Mean of log(degree + 1), by which the amplification is divided.
        dropout: Dropout rate of the nodes' activated channels.
        last_edges: Whether the last layer updates edges, too.
    """

    def __init__(
        self,
        hidden: int = 32,
        layers: int = 3,
        delta: float = 2.3173,
        dropout: float = 0.0,
        last_edges: bool = True,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            NGGNNLayer(hidden, delta, last_edges or k < layers - 1) for k in range(layers)
        )
        self.norms = nn.ModuleList(GraphNorm(hidden) for _ in range(layers - 1))
        self.dropout = nn.Dropout(dropout)
        self.last_edges = last_edges

    def forward(
        self,
        route: Route,
        nodes: Float[Tensor, "*B N H"],
        edges: Sequence[Float[Tensor, "... H"]],
    ) -> tuple[Float[Tensor, "*B n H"], Iterable[Float[Tensor, "... H"]]]:
        """Pass messages along all edges, in the last layer only along those that are needed.

        Args:
            route: Layout of nodes and edges.
            nodes: Initial states of nodes.
            edges: Initial states of all parts: (*B, P, E, H) for grids, (D, H) for segments.

        Returns:
            States of the nodes that receive messages in the last layer, and an iterable of the
            states of its edges, updated if ``last_edges``. They are computed lazily, once.
        """
        walk, layer, before = route.all, None, None
        for k, following in enumerate(self.layers):
            if k == len(self.norms):
                walk, edges = route.last, route.kept(edges)
            if layer is not None:  # edges are updated where they are read next
                edges = layer.next_edges(walk, nodes, edges, before)
                before = layer.out
            layer = following
            assert isinstance(layer, NGGNNLayer)
            nodes = layer.next_nodes(walk, nodes, edges, before)
            if k < len(self.norms):
                nodes = self.dropout(nn.functional.silu(self.norms[k](nodes, route)))
        if self.last_edges and layer is not None:
            edges, before = layer.next_edges(walk, nodes, edges, before), layer.out
        return nodes, edges if before is None else map(before, edges)
