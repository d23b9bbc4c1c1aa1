"""Pairs of nodes of one network that have no edge."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from l2o_graph.layout.arrivals import counted


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


def unjoined_pairs(
    sizes: Int64[Tensor, " I"], most_pairs: int, joined: Iterable[tuple[Tensor, Tensor]]
) -> Pairs:
    """Find them; networks of more than ``most_pairs`` pairs have none.

    Args:
        sizes: Nodes of each network.
        most_pairs: Most pairs of nodes of a network, N * N.
        joined: Nodes that an edge joins either way, of networks that have few enough, by their
            number among all; both tensors of a pair broadcast.
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
