"""NG-GNN: a message-passing network over neurons (Kofinas et al. 2024, section 3.2).

PNA aggregation (Corso et al. 2020) of messages that the edges modulate as FiLM does (Perez et
al. 2018), and edges that are updated from their two nodes. States of edges lie in P planes: plane
0 is the forward edge source -> target, plane 1 its reverse, where edges are walked both ways.

States may have batch axes in front, written *B: networks of one architecture, each by itself.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Chunk, Topology, with_edges
from l2o_graph.layout.edges import LazyEdges, over_planes
from l2o_graph.layout.node_ranges import split_ranges
from l2o_graph.layout.partials import PNAPartial


class GraphNorm(nn.Module):
    """Layer normalisation over all entries of one graph's nodes, then a scale and shift a channel.

    PyTorch Geometric's LayerNorm in graph mode. The released code called it without saying
    which node belongs to which graph, so one graph's answer depended on the others in its batch.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Float[Tensor, "*B N H"]) -> Float[Tensor, "*B N H"]:
        """Normalise the nodes of each graph by itself."""
        centred = x - x.mean((-2, -1), keepdim=True)
        deviation = (centred.square().mean((-2, -1), keepdim=True) + 1e-10).sqrt()
        return centred / (deviation + 1e-5) * self.weight + self.bias


class NGGNNLayer(nn.Module):
    """One round of messages, node updates and edge updates.

    For the edge j -> i with state e, and F = ``hidden`` channels::

        (s, t) = W_film e
        m_ji   = s * W_message [v_i; v_j] + t
        a_i    = [mean, min, max, std](m_ji over j), and the same times log(deg_i + 1) / delta
        u_i    = W_mix W_node [v_i; a_i]
        e_ji  <- W_out SiLU(W_edge e_ji + W_source v_j + W_target v_i)

    Args:
        hidden: F.
        delta: Mean of log(degree + 1) that the amplification is relative to.
        edges: Whether edges are updated; without, the layer has no weights for it.
        reverse: Whether edges are walked both ways, in two planes, or along the flow alone.
    """

    def __init__(self, hidden: int, delta: float, edges: bool = True, reverse: bool = True):
        super().__init__()
        self.delta, self.planes = delta, 2 if reverse else 1
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
        chunk: Chunk,
        nodes: Float[Tensor, "*B N H"],
        edges: Float[Tensor, "*B P E H"],
    ) -> Float[Tensor, "*B P E H"]:
        """What each edge carries."""
        of_target, of_source = self.message.weight.chunk(2, dim=1)
        target_term = nodes @ of_target.T + self.message.bias
        terms = over_planes(chunk, target_term, nodes @ of_source.T, self.planes)
        # Two maps rather than one in two halves, whose gradients would have to be put together.
        scale, shift = (
            nn.functional.linear(edges, weight, bias)
            for weight, bias in zip(self.film.weight.chunk(2), self.film.bias.chunk(2), strict=True)
        )
        return torch.addcmul(shift, scale, terms)

    def next_nodes(
        self, topology: Topology, chunks: Sequence[Chunk], nodes: Tensor, edges: LazyEdges
    ) -> Float[Tensor, "*B N H"]:
        """Gather the messages of all chunks and update the nodes."""

        def sides() -> Iterator[PNAPartial]:
            for chunk in chunks:
                messages = self.messages(chunk, nodes, edges(chunk))
                for block, own in with_edges(chunk):
                    grids = messages[..., own, :].unflatten(-2, block.grid).unbind(-5)
                    dims = (-3, -2) if block.from_rows else (-2, -3)  # what leads to one node
                    yield from map(PNAPartial.of, grids, dims)

        # A plane's edges lead to one side: forward edges to targets, their reverses to sources.
        ranges = [side for chunk in chunks for p in chunk for side in p.ends[: self.planes]]
        parts = split_ranges(tuple(ranges), topology.spec.num_nodes)
        no_messages = nodes.new_zeros(*nodes.shape[:-1], 4 * nodes.shape[-1])
        gathered = parts.gathered(sides(), PNAPartial.aggregates, no_messages)
        degree = topology.degree if self.planes == 2 else topology.in_degree
        return self.received(nodes, gathered, degree)

    def received(
        self,
        nodes: Float[Tensor, "*B n H"],
        gathered: Float[Tensor, "*B n four_H"],
        degree: Float[Tensor, " n"],
    ) -> Float[Tensor, "*B n H"]:
        """Update nodes from the aggregates of their messages."""
        amplification = torch.log(degree.to(nodes) + 1)[:, None] / self.delta
        received = torch.cat([nodes, gathered, gathered * amplification], dim=-1)
        return self.mix(self.node(received))

    def next_edges(
        self,
        chunk: Chunk,
        nodes: Float[Tensor, "*B N H"],
        edges: Float[Tensor, "*B P E H"],
    ) -> Float[Tensor, "*B P E H"]:
        """Update the edges of a chunk from the nodes that this layer made."""
        terms = over_planes(chunk, self.target(nodes), self.source(nodes), self.planes)
        return self.out(nn.functional.silu(self.edge(edges) + terms))


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
        reverse: Whether edges are walked both ways, in two planes, or along the flow alone.
    """

    def __init__(
        self,
        hidden: int = 32,
        layers: int = 3,
        delta: float = 2.3173,
        dropout: float = 0.0,
        last_edges: bool = True,
        reverse: bool = True,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            NGGNNLayer(hidden, delta, last_edges or k < layers - 1, reverse) for k in range(layers)
        )
        self.norms = nn.ModuleList(GraphNorm(hidden) for _ in range(layers - 1))
        self.dropout = nn.Dropout(dropout)
        self.last_edges = last_edges

    def forward(
        self,
        topology: Topology,
        chunks: Sequence[Chunk],
        nodes: Float[Tensor, "*B N H"],
        edges: LazyEdges,
        last: Sequence[Chunk] | None = None,
    ) -> tuple[Float[Tensor, "*B N H"], LazyEdges]:
        """Pass messages.

        Args:
            topology: Where everything lies.
            chunks: All kernels, in order; the states of a chunk's edges are one tensor.
            nodes: (*B, N, H) initial states.
            edges: Gives the initial states (*B, P, E, H) of a chunk's edges.
            last: The chunks whose messages the last round gathers, all unless said otherwise: who
                reads few nodes needs no more than what leads to them. Nodes that other chunks
                lead to then have states that mean nothing.

        Returns:
            Final node states, and a function that gives a chunk's final edge states, which are
            worked out once, when they are asked for.
        """
        edges = cache(edges)
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, NGGNNLayer)
            is_last = k == len(self.norms)
            gathered = chunks if last is None or not is_last else last
            nodes = layer.next_nodes(topology, gathered, nodes, edges)
            if not is_last:
                norm = self.norms[k]
                alone = [norm(nodes[..., slice(*network), :]) for network in topology.networks]
                nodes = self.dropout(nn.functional.silu(torch.cat(alone, dim=-2)))
            if not is_last or self.last_edges:
                edges = cache(_after(layer, nodes, edges))
        return nodes, edges


def _after(layer: NGGNNLayer, nodes: Tensor, edges: LazyEdges) -> LazyEdges:
    """Edge states one layer further."""
    return lambda chunk: layer.next_edges(chunk, nodes, edges(chunk))
