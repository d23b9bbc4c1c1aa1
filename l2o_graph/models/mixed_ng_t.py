"""NG-T over a batch of networks of any architectures, as one graph.

The model is that of ``ng_t``, and so are the answers, up to rounding; see ``mixed_ng_gnn``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from l2o_graph.layout.segments import DirectedEdges, Segments
from l2o_graph.models.ng_t import NGT, EdgeUpdate, NGTLayer, NodeUpdate


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of nodes of each network that have no edge, a node and itself among them.

    Attributes:
        place: For each network its nodes, filled up with 0.
        left_out: For each network which pairs are not there or have an edge.
        nodes: The nodes of networks with few enough pairs; of others none has any but itself.
        inside: Where these lie in ``place``, flattened.
    """

    place: Int64[Tensor, "I most"]
    left_out: Bool[Tensor, "I most most"]
    nodes: Int64[Tensor, " n"]
    inside: Int64[Tensor, " n"]


def pairs_of(
    directed: DirectedEdges,
    network: Int64[Tensor, " N"],
    sizes: Int64[Tensor, " I"],
    most_pairs: int,
) -> Pairs:
    """Find them; networks of more than ``most_pairs`` pairs have none."""
    small = sizes.square() <= most_pairs
    count, index = int(small.sum()), small.cumsum(0) - 1
    most = int(sizes[small].max()) if count else 0
    number = torch.arange(len(network), device=network.device) - (sizes.cumsum(0) - sizes)[network]
    nodes = small[network].nonzero().flatten()
    inside = index[network[nodes]] * most + number[nodes]
    place = nodes.new_zeros(count * most).index_copy_(0, inside, nodes).view(count, most)
    absent = torch.arange(most, device=nodes.device) >= sizes[small][:, None]
    left_out = absent[:, None].repeat(1, most, 1)
    source, lengths = directed.all.source, directed.all.lengths
    target = directed.all.target.repeat_interleave(lengths)
    own = small[network[source]]
    source, target = source[own], target[own]
    left_out[index[network[source]], number[target], number[source]] = True
    left_out.diagonal(dim1=1, dim2=2).fill_(False)
    return Pairs(place, left_out, nodes, inside)


def mixed_ng_t(
    model: NGT,
    directed: DirectedEdges,
    network: Int64[Tensor, " N"],
    sizes: Int64[Tensor, " I"],
    nodes: Float[Tensor, "N H"],
    edges: Float[Tensor, "D C"],
) -> Float[Tensor, "n H"]:
    """Attend; arguments and answers are those of ``mixed_ng_gnn``, of a model without ``axial``.

    Raises:
        ValueError: For a model that is not ``plain``, or whose last layer updates edges.
    """
    if not all(layer.node.plain for layer in model.layers if isinstance(layer, NGTLayer)):
        raise ValueError("NG-T: expected plain attention where there is no edge, found none")
    pairs = pairs_of(directed, network, sizes, model.most_pairs)
    for layer in model.layers:
        assert isinstance(layer, NGTLayer)
        if layer.edge is None:
            gathered = _attended(layer.node, directed.last, pairs, nodes, edges[directed.kept])
            return layer.node.post(nodes[directed.last.nodes], layer.node.out(gathered))
        gathered = _attended(layer.node, directed.all, pairs, nodes, edges)
        nodes = layer.node.post(nodes, layer.node.out(gathered))
        edges = _next_edges(layer.edge, directed, nodes, edges)
    raise ValueError("NG-T: expected a last layer without an edge update, found none")


def _attended(
    update: NodeUpdate,
    segments: Segments,
    pairs: Pairs,
    nodes: Float[Tensor, "N H"],
    edges: Float[Tensor, "D C"],
) -> Float[Tensor, "n A"]:
    """The mean of values for each node that gathers, all heads side by side."""
    queries, keys, values = (nodes @ update.of_node.weight.T).chunk(3, dim=1)
    on_query, on_key, scale, shift = (
        F.linear(edges, weight) for weight in update.of_edge.weight.chunk(4)
    )
    query = segments.over(on_query, queries.index_select(0, segments.target))
    key = on_key + keys.index_select(0, segments.source)
    value = torch.addcmul(shift, 1 + scale, values.index_select(0, segments.source))
    by_head = (update.heads, -1)
    scores = update.scale * (query * key).unflatten(1, by_head).sum(2)
    alone, plain = (x[segments.nodes] for x in _alone(update, pairs, queries, keys, values))
    # One softmax over pairs of both kinds, relative to the highest so that nothing overflows.
    top = torch.maximum(segments.largest(scores), alone).detach()
    weights = segments.over(scores, -top[segments.to]).exp()
    others = (alone - top).exp()
    total = segments.summed(weights[:, :, None] * value.unflatten(1, by_head))
    total = torch.addcmul(total, others[:, :, None], plain)
    mass = segments.summed(weights) + others
    return (total / mass[:, :, None]).flatten(1)


def _alone(
    update: NodeUpdate,
    pairs: Pairs,
    queries: Float[Tensor, "N A"],
    keys: Float[Tensor, "N A"],
    values: Float[Tensor, "N A"],
) -> tuple[Float[Tensor, "N heads"], Float[Tensor, "N heads d"]]:
    """Log mass and mean value of the pairs of each node that have no edge."""
    by_head = (update.heads, -1)
    itself = update.scale * (queries * keys).unflatten(1, by_head).sum(2)
    query, key, value = (
        x[pairs.place].unflatten(2, by_head).transpose(1, 2) for x in (queries, keys, values)
    )
    scores = update.scale * (query @ key.mT)
    scores = scores.masked_fill(pairs.left_out[:, None], -torch.inf)
    masses = scores.logsumexp(3)
    means = (scores - masses[..., None]).exp() @ value
    found = (x.transpose(1, 2).flatten(0, 1)[pairs.inside] for x in (masses, means))
    whole = itself, values.unflatten(1, by_head)
    mass, mean = (w.index_copy(0, pairs.nodes, x) for w, x in zip(whole, found, strict=True))
    return mass, mean


def _next_edges(
    update: EdgeUpdate,
    directed: DirectedEdges,
    nodes: Float[Tensor, "N H"],
    edges: Float[Tensor, "D C"],
) -> Float[Tensor, "D C"]:
    """Update edges from the nodes that the layer made."""
    both = torch.cat([edges, edges.index_select(0, directed.partner)], dim=1)
    terms = directed.all.spread(update.target(nodes), update.source(nodes))
    return update.post(edges, update.out(F.gelu(update.edge(both) + terms)))
