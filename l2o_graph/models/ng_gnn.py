"""NG-GNN: a message-passing network over neurons (Kofinas et al. 2024, section 3.2).

PNA aggregation (Corso et al. 2020) of messages that the edges modulate as FiLM does (Perez et
al. 2018), and edges that are updated from their two nodes. Where edges lie is another's matter: in
grids, for networks of one architecture (``GridRoute``), or in segments, for a batch of any
(``DirectedEdges``). Either way directed edges come in parts, each with its states in one tensor.

Axes: E directed edges of a part, S segments, n nodes that gather, of N; *B as in ``layout.grids``.
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

# PyTorch Geometric's floor under a variance; at or below it the standard deviation is called 0.
SMALLEST_VARIANCE = 1e-5


class GraphNorm(nn.Module):
    """Layer normalisation over all entries of one graph's nodes, then a scale and shift a channel.

    PyTorch Geometric's LayerNorm in graph mode. The released code called it without saying
    which node belongs to which graph, so one graph's answer depended on the others in its batch.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Float[Tensor, "*B N H"], route: Route) -> Float[Tensor, "*B N H"]:
        """Normalise the nodes of each graph by itself."""
        centred = x - route.mean(x)
        deviation = (route.mean(centred.square()) + 1e-10).sqrt()
        return centred / (deviation + 1e-5) * self.weight + self.bias


def pna(
    arrivals: Arrivals,
    sums: Float[Tensor, "*B S two_H"],
    low: Float[Tensor, "*B S H"],
    high: Float[Tensor, "*B S H"],
) -> Float[Tensor, "*B n four_H"]:
    """Mean, minimum, maximum and deviation of each node's messages; of none, zeros.

    From what segments have of them: sums and sums of squares, minima and maxima.
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

    What reads edges next is a linear map, too, which becomes one with W_out: e is handed on as
    SiLU(..), and W_out as ``before``.

    Args:
        hidden: F.
        delta: Mean of log(degree + 1) that the amplification is relative to.
        edges: Whether edges are updated; without, the layer has no weights for it.
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
        """What each edge carries, part by part."""
        of_target, of_source = self.message.weight.chunk(2, dim=1)
        target_term = nodes @ of_target.T + self.message.bias
        # Two maps rather than one in two halves, whose gradients would have to be put together.
        halves = zip(self.film.weight.chunk(2), self.film.bias.chunk(2), strict=True)
        maps = [_behind(before, *half) for half in halves]
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
        """Gather the messages of all parts and update the nodes."""
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
        """Update edges from the nodes that this layer made, but for W_out."""
        own = _behind(before, self.edge.weight, self.edge.bias)
        spread = walk.spread(self.target(nodes), self.source(nodes))
        return [
            nn.functional.silu(nn.functional.linear(states, *own) + terms)
            for states, terms in zip(edges, spread, strict=True)
        ]


def _behind(before: nn.Linear | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear map behind another one."""
    if before is None:
        return weight, bias
    return weight @ before.weight, torch.addmv(bias, weight, before.bias)


@torch.no_grad()
def keep_nodes(model: "NGGNN") -> None:
    """Give a model first weights with which a node's own state outweighs what it gathers.

    W_mix and the part of W_node that reads the node itself become orthogonal. NG-GNN has no
    residuals, and of torch's own first weights 1 in 9 reads the node: after four rounds nothing
    is left of what a node was told first, its activation or what it says at probes.
    The optimizer's networks keep torch's, with which its checkpoints were trained.
    """
    for layer in model.layers:
        assert isinstance(layer, NGGNNLayer)
        hidden = layer.mix.out_features
        nn.init.orthogonal_(layer.mix.weight)
        nn.init.orthogonal_(layer.node.weight[:, :hidden])


class NGGNN(nn.Module):
    """NG-GNN: node and edge states in, node and edge states out (equations above).

    Args:
        hidden: Channels of nodes and edges.
        layers: Rounds of messages. Nodes are normalised and activated after all but the last.
        delta: Mean of log(degree + 1) that the amplification is relative to.
        dropout: Share of a node's activated channels that training leaves out.
        last_edges: Whether edges are updated after the last round too, as after all others.
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
        """Pass messages along all edges, and in the last round along those that are needed there.

        Args:
            route: Where everything lies.
            nodes: Initial states.
            edges: Initial states of all parts: of grids (*B, P, E, H), of segments (D, H).

        Returns:
            States of the nodes that gather last, and of the edges of the last round, updated if
            ``last_edges``; these are worked out when they are asked for, once.
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
