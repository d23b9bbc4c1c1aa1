"""NG-GNN over a batch of networks of any architectures, as one graph.

The model is that of ``ng_gnn``, and so are the answers, up to rounding; edges lie in segments
instead of in the blocks of one architecture. Only output nodes are read, so that the last round
is worked out for these alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from l2o_graph.layout.segments import DirectedEdges, Segments
from l2o_graph.models.ng_gnn import NGGNN, GraphNorm, NGGNNLayer


def mixed_ng_gnn(
    model: NGGNN,
    directed: DirectedEdges,
    network: Int64[Tensor, " N"],
    sizes: Int64[Tensor, " I"],
    nodes: Float[Tensor, "N H"],
    edges: Float[Tensor, "D H"],
) -> Float[Tensor, "n H"]:
    """Pass messages: first states of nodes and edges -> last states of the nodes that are read.

    ``network`` says which network each node belongs to, ``sizes`` how many nodes each has. Edges
    are in the order of ``directed``; the model has ``last_edges=False``.
    """
    states = _States(edges)
    layers = [layer for layer in model.layers if isinstance(layer, NGGNNLayer)]
    for layer, following, norm in zip(layers, layers[1:], model.norms, strict=False):
        assert isinstance(norm, GraphNorm)
        nodes = _next_nodes(layer, directed.all, nodes, states)
        nodes = model.dropout(F.silu(_normed(norm, network, sizes, nodes)))
        ahead = directed.last if following is layers[-1] else directed.all
        states = states.only(directed, ahead)
        terms = ahead.spread(layer.target(nodes), layer.source(nodes))
        hidden = F.silu(states.mapped(layer.edge.weight, layer.edge.bias) + terms)
        states = _States(hidden, layer.out)
    return _next_nodes(layers[-1], directed.last, nodes, states.only(directed, directed.last))


@dataclass(frozen=True, slots=True)
class _States:
    """States of D directed edges: ``inner``, and a linear map that becomes one with the next."""

    inner: Float[Tensor, "D H"]
    outer: nn.Linear | None = None

    def only(self, directed: DirectedEdges, segments: Segments) -> "_States":
        """Of the directed edges of some segments."""
        if len(segments.source) == len(self.inner):
            return self
        return _States(self.inner[directed.kept], self.outer)

    def mapped(
        self, weight: Float[Tensor, "out H"], bias: Float[Tensor, " out"]
    ) -> Float[Tensor, "D out"]:
        """A linear map of them."""
        if self.outer is not None:
            bias = torch.addmv(bias, weight, self.outer.bias)
            weight = weight @ self.outer.weight
        return F.linear(self.inner, weight, bias)


def _next_nodes(
    layer: NGGNNLayer, segments: Segments, nodes: Float[Tensor, "N H"], edges: _States
) -> Float[Tensor, "n H"]:
    """Gather messages and update nodes."""
    of_target, of_source = layer.message.weight.chunk(2, dim=1)
    terms = segments.spread(nodes @ of_target.T + layer.message.bias, nodes @ of_source.T)
    # Two maps rather than one in two halves, as in ``NGGNNLayer.messages``.
    scale, shift = (
        edges.mapped(weight, bias)
        for weight, bias in zip(layer.film.weight.chunk(2), layer.film.bias.chunk(2), strict=True)
    )
    partial = segments.partial(torch.addcmul(shift, scale, terms))
    gathered = partial.aggregates().masked_fill((segments.degree == 0)[:, None], 0)
    own = nodes if len(segments.nodes) == len(nodes) else nodes[segments.nodes]
    return layer.received(own, gathered, segments.degree)


def _normed(
    norm: GraphNorm,
    network: Int64[Tensor, " N"],
    sizes: Int64[Tensor, " I"],
    x: Float[Tensor, "N H"],
) -> Float[Tensor, "N H"]:
    """``GraphNorm`` of each network by itself."""

    def mean(entries: Tensor) -> Tensor:
        nothing = entries.new_zeros(len(sizes))
        return (nothing.index_add(0, network, entries.mean(1)) / sizes)[network, None]

    centred = x - mean(x)
    deviation = (mean(centred.square()) + 1e-10).sqrt()
    return centred / (deviation + 1e-5) * norm.weight + norm.bias
