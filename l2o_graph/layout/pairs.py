"""Pairs of nodes of one network that have no edge."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from l2o_graph.layout.arrivals import counted


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of nodes without an edge in each small network, also of each node and itself.

    Attributes:
        place: Nodes of each small network, padded with 0.
        left_out: Mask of the pairs of each network that are padding or have an edge.
        nodes: Nodes of all small networks; nodes of others have no pair but with themselves.
        inside: Indices of these nodes in ``place``, flattened.
    """

    place: Int64[Tensor, "I most"]
    left_out: Bool[Tensor, "I most most"]
    nodes: Int64[Tensor, " n"]
    inside: Int64[Tensor, " n"]


def unjoined_pairs(
    sizes: Int64[Tensor, " I"], most_pairs: int, joined: Iterable[tuple[Tensor, Tensor]]
) -> Pairs:
    """Find the pairs without an edge of networks with at most ``most_pairs`` pairs.

    Args:
        sizes: Number of nodes of each network.
        most_pairs: Largest number of pairs of nodes of a network, N * N.
        joined: Indices of nodes that an edge joins in either direction, in these networks; the
            two tensors of a pair broadcast.
    """
    network, number = counted(sizes)
    small = sizes.square() <= most_pairs
    count, index = int(small.sum()), small.cumsum(0) - 1
    most = int(sizes[small].max()) if count else 0
    nodes = small[network].nonzero().flatten()
    inside = index[network[nodes]] * most + number[nodes]
    place = nodes.new_zeros(count * most).index_copy_(0, inside, nodes).view(count, most)
    absent = torch.arange(most, device=nodes.device) >= sizes[small][:, None]
    left_out = absent[:, None].repeat(1, most, 1)
    for one, other in joined:
        left_out[index[network[one]], number[one], number[other]] = True
        left_out[index[network[one]], number[other], number[one]] = True
    left_out.diagonal(dim1=1, dim2=2).fill_(False)
    return Pairs(place, left_out, nodes, inside)
