"""What each node is: the row of a table that it reads, and its activation."""

from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor

from l2o_graph.layout.blocks import Topology
from l2o_graph.layout.spec import ACTIVATIONS, NetSpec


def position_rows(topology: Topology) -> Int64[Tensor, " N"]:
    """The row of a table that each node reads: one an input, a hidden layer, an output."""
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
    """Which of the ``ACTIVATIONS`` each node has, by number."""
    sizes = torch.tensor([neurons.size for neurons in spec.neurons], dtype=torch.long)
    kinds = [ACTIVATIONS.index(neurons.activation) for neurons in spec.neurons]
    return torch.tensor(kinds, dtype=torch.long).repeat_interleave(sizes)
