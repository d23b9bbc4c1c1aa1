"""Position embedding index and activation of each node."""

from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor

from l2o_graph.layout.blocks import Topology
from l2o_graph.layout.spec import ACTIVATIONS, NetSpec


def position_rows(topology: Topology) -> Int64[Tensor, " N"]:
    """Return the position of each node: one for each input, hidden layer and output."""
    rows, at, network = [torch.zeros(0, dtype=torch.long)], 0, 0
    for neurons in topology.spec.neurons:
        if neurons.network != network:
            at, network = 0, neurons.network
        if neurons.role == "hidden":
            rows.append(torch.full((neurons.size,), at))
            at += 1
        else:
            rows.append(torch.arange(at, at + neurons.size))
            at += neurons.size
    return torch.cat(rows)


@lru_cache(maxsize=64)
def node_activations(spec: NetSpec) -> Int64[Tensor, " N"]:
    """Return the index in ``ACTIVATIONS`` of each node's activation."""
    sizes = torch.tensor([neurons.size for neurons in spec.neurons], dtype=torch.long)
    kinds = [ACTIVATIONS.index(neurons.activation) for neurons in spec.neurons]
    return torch.tensor(kinds, dtype=torch.long).repeat_interleave(sizes)
