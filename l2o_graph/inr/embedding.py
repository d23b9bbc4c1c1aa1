"""Weights, biases and what neurons say -> first states of edges and nodes.

Kofinas et al. 2024, section 3: two linear maps of a number's Fourier features
(Tancik et al. 2020), a learned row for each position, and probes.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.graph import Topology
from l2o_graph.models.embedding import position_rows

FREQUENCIES = 128

# Where an edge and its reverse have the weight in what they read: [w, 0, w] and [0, w, w].
BOTH_WAYS = ((1.0, 0.0, 1.0), (0.0, 1.0, 1.0))
ALONE = ((1.0,),)


class FourierFeatures(nn.Module):
    """[cos(2 pi B x); sin(2 pi B x)] of vectors x, with B drawn once from N(0, sigma^2).

    Args:
        inputs: Entries of a vector.
        sigma: Deviation of the frequencies; with 0 the features are the vector itself.
    """

    frequencies: Tensor | None

    def __init__(self, inputs: int, sigma: float):
        super().__init__()
        drawn = sigma * torch.randn(FREQUENCIES, inputs) if sigma else None
        self.register_buffer("frequencies", drawn)
        self.size = 2 * FREQUENCIES if sigma else inputs

    def forward(
        self, x: Float[Tensor, "*B n"], ways: Sequence[Sequence[float]] = ALONE
    ) -> Float[Tensor, "*B W n size"]:
        """Features of the vectors x * way, for each number x and each of W ways."""
        ways_of_x = x.new_tensor(ways)
        if self.frequencies is None:
            return x[..., None, :, None] * ways_of_x[:, None]
        turns = 2 * math.pi * (ways_of_x @ self.frequencies.T)
        # A cosine is a sine a quarter turn ahead: all features are one operation.
        ahead = turns.new_tensor([math.pi / 2, 0.0]).repeat_interleave(FREQUENCIES)
        return torch.addcmul(ahead, x[..., None, :, None], turns.repeat(1, 2)[:, None]).sin_()


class EdgeEmbedding(nn.Module):
    """W_second W_first gamma, with gamma the features of what an edge and its reverse read.

    Args:
        size: Channels C.
        sigma: Of the features.
        reverse: A forward edge reads [w, 0, w] and its reverse [0, w, w]; without, the forward
            edge reads w and its reverse 0. What the forward edge knows reaches the reverse one
            then in the first edge update. (The released NG-GNN has no reverse edges without.)
    """

    def __init__(self, size: int, sigma: float, reverse: bool):
        super().__init__()
        self.reverse = reverse
        self.features = FourierFeatures(3 if reverse else 1, sigma)
        self.first = nn.Linear(self.features.size, size)
        self.second = nn.Linear(size, size)

    def forward(self, weights: Float[Tensor, "*B E"]) -> Float[Tensor, "*B 2 E C"]:
        """First states of edges and of their reverses."""
        if self.reverse:
            return self._mapped(self.features(weights, BOTH_WAYS))
        forward = self._mapped(self.features(weights))
        nothing = self._mapped(self.features(weights.new_zeros(1)))
        return torch.cat([forward, nothing.expand_as(forward)], dim=-3)

    def _mapped(self, features: Float[Tensor, "*n F"]) -> Float[Tensor, "*n C"]:
        # Nothing lies between the two maps, so they are one: half the work and no state between.
        weight = self.second.weight @ self.first.weight
        return nn.functional.linear(features, weight, self.second(self.first.bias))


class NodeEmbedding(nn.Module):
    """W_second (W_first gamma(b) + p) + t, with b a bias, 0 at inputs.

    What is added: p = LayerNorm(W_l r), where r is what a neuron of layer l says at the probes,
    and t the row of a table of the input, the hidden layer or the output that it is.

    Args:
        topology: Of the networks, a chain of layers.
        size: Channels H.
        sigma: Of the features.
        probes: How many, 0 for none.
        positions: Whether there is a table.
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
        """First states of nodes.

        Args:
            topology: Of the networks.
            biases: Of each layer.
            responses: Of the inputs and of each layer at the probes; none without probes.
        """
        inputs = biases[0].new_zeros(*biases[0].shape[:-1], topology.spec.neurons[0].size)
        states = self.first(self.features(torch.cat([inputs, *biases], dim=-1)).squeeze(-3))
        if self.probes:
            said = [read(r) for read, r in zip(self.probes, responses, strict=True)]
            states = states + torch.cat(said, dim=-2)
        states = self.second(states)
        if self.table is None:
            return states
        return states + self.table[position_rows(topology).to(states.device)]
