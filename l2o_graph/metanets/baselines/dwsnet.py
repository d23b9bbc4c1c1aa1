"""DWSNet (Navon et al. 2023): equivariant layers under permutations of hidden neurons.

Depth, width, norm, pooling and head are those of AvivNavon/DWSNets on MNIST: five layers of 32
channels on the bare parameters, BatchNorm, maxima over hidden neurons for the invariant, one
linear layer behind them. Within its layers the release takes maxima and self-attention where the
paper's linear maps, and so these, take means.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.metanets.baselines.flat import Biases, Deltas, Weights
from l2o_graph.metanets.baselines.inr_space import deltas_of, features_of, space_of
from l2o_graph.models.equivariant import HNP
from l2o_graph.models.weight_space import equivariant_net, pooled, pooled_size


class DWSNetClassifier(nn.Module):
    """Equivariant layers, maxima over hidden neurons, a linear layer.

    Args:
        layout: Widths of the networks, from input to output.
        classes: How many logits to answer with.
        hidden: Channels.
        layers: Equivariant layers.
        dropout: Share of the channels that is dropped behind each but the last in training.
    """

    def __init__(
        self,
        layout: Sequence[int],
        classes: int = 10,
        hidden: int = 32,
        layers: int = 5,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.space = space_of(layout, HNP)
        self.net = equivariant_net(self.space, [1, *[hidden] * layers], True, dropout)
        self.readout = nn.Linear(hidden * pooled_size(self.space), classes)

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I classes"]:
        """Logits of each network."""
        features = [x.relu() for x in self.net(features_of(weights, biases))]
        return self.readout(pooled(self.space, features, torch.amax))


class DWSNetEditor(nn.Module):
    """Equivariant layers, the last of them to one channel.

    Args:
        layout: Widths of the networks, from input to output.
        hidden: Channels.
        layers: Equivariant layers.
        dropout: Share of the channels that is dropped between layers in training.
    """

    def __init__(
        self, layout: Sequence[int], hidden: int = 32, layers: int = 5, dropout: float = 0.0
    ):
        super().__init__()
        channels = [1, *[hidden] * (layers - 1), 1]
        self.net = equivariant_net(space_of(layout, HNP), channels, True, dropout)

    def forward(self, weights: Weights, biases: Biases) -> Deltas:
        """Deltas of weights and of biases."""
        return deltas_of(self.net(features_of(weights, biases)))
