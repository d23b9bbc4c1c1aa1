"""Initial states of edges and nodes from weights, biases and responses to probes.

Kofinas et al. 2024, section 3: two linear maps of a number's Fourier features
(Tancik et al. 2020), a learned embedding of each position, and probes.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Topology
from l2o_graph.layout.positions import position_rows
from l2o_graph.models.fourier import FourierFeatures, Projection, read_both_ways


class EdgeEmbedding(Projection):
    """Projection of the weight w of an edge and of its reverse.

    Args:
        size: Number of channels C.
        sigma: Standard deviation of the frequencies of Fourier features.
        reverse: Whether a forward edge reads [w, 0, w] and its reverse [0, w, w]; otherwise the
            forward edge reads w, and its reverse, if any, 0.
        both_ways: Whether there are reverse edges.
    """

    def __init__(self, size: int, sigma: float, reverse: bool, both_ways: bool):
        super().__init__(3 if reverse else 1, size, sigma)
        self.reverse, self.both_ways = reverse, both_ways

    def forward(self, x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B P E C"]:
        """Compute initial states of edges with weights x and, in plane 1, of their reverses."""
        if self.reverse:
            return super().forward(torch.stack(read_both_ways(x[..., None]), dim=-3))
        forward = super().forward(x[..., None, :, None])
        if not self.both_ways:
            return forward
        nothing = super().forward(x.new_zeros(1, 1))
        return torch.cat([forward, nothing.expand_as(forward)], dim=-3)


class NodeEmbedding(nn.Module):
    """W_second (W_first gamma(b) + p) + t, with b the bias, 0 at inputs.

    With probes, p = LayerNorm(W_l r), where r are the responses of a neuron of layer l. With
    position embeddings, t is that of the input, the hidden layer or the output.
    """

    table: nn.Parameter | None

    def __init__(self, topology: Topology, size: int, sigma: float, probes: int, positions: bool):
        super().__init__()
        layers = topology.spec.neurons
        self.features = FourierFeatures(1, sigma)
        self.first = nn.Linear(self.features.size, size)
        self.second = nn.Linear(size, size)
        self.probes = nn.ModuleList(
            nn.Sequential(nn.Linear(probes, size), nn.LayerNorm(size))
            for _ in (layers if probes else ())
        )
        rows = sum(1 if layer.role == "hidden" else layer.size for layer in layers)
        self.table = nn.Parameter(torch.randn(rows, size)) if positions else None

    def forward(
        self,
        topology: Topology,
        biases: Sequence[Float[Tensor, "*B _"]],
        responses: Sequence[Float[Tensor, "*B _ M"]],
    ) -> Float[Tensor, "*B N H"]:
        """Compute initial states; without probes, ``responses`` is empty."""
        inputs = biases[0].new_zeros(*biases[0].shape[:-1], topology.spec.neurons[0].size)
        states = self.first(self.features(torch.cat([inputs, *biases], dim=-1)[..., None]))
        if self.probes:
            mapped = [read(r) for read, r in zip(self.probes, responses, strict=True)]
            states = states + torch.cat(mapped, dim=-2)
        states = self.second(states)
        if self.table is None:
            return states
        return states + self.table[position_rows(topology).to(states.device)]
