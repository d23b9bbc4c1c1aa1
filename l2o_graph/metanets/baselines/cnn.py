"""Baselines on CNNs: statistics of layers (StatNN), and equivariant layers (NFN)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.datasets.cnn.files import CNNs, stacked
from l2o_graph.metanets.cnn_config import CNNModelConfig
from l2o_graph.metanets.structure import structure_of
from l2o_graph.models.equivariant import HNP, weight_space
from l2o_graph.models.mlp import mlp
from l2o_graph.models.stat_nn import StatNN, layer_statistics
from l2o_graph.models.weight_space import equivariant_net, pooled, pooled_size

HEAD = 256  # width of both hidden layers of NFN's head


class StatNNBody(nn.Module):
    """StatNN on networks of any architectures."""

    def __init__(self, config: CNNModelConfig):
        super().__init__()
        self.net = StatNN(config.layers, 1, config.hidden, config.dropout)

    def forward(self, networks: CNNs) -> Float[Tensor, " I"]:
        """Predict the logits of the networks' accuracy."""
        like = next(self.parameters())
        rows: list[Tensor] = [like.new_zeros(0)] * len(networks)
        for which in networks.which.unique().tolist():
            own = (networks.which == which).nonzero().flatten()
            tensors = stacked(networks, own, like)
            found = layer_statistics(tensors[::2], tensors[1::2], self.net.layers)
            for i, row in zip(own.tolist(), found, strict=True):
                rows[i] = row
        return self.net.head(torch.stack(rows)).squeeze(1)


class NFNBody(nn.Module):
    """NFN-HNP (Zhou et al. 2023): equivariant layers with ReLU, means over hidden neurons, an MLP.

    Axes of inputs and outputs, and positions of kernels, are not averaged.

    Args:
        config: Configuration of the model, with the one architecture that it reads.
    """

    def __init__(self, config: CNNModelConfig):
        super().__init__()
        assert config.architecture is not None
        self.architecture = config.architecture
        self.space = weight_space(structure_of(config.architecture), HNP)
        channels = [1, *[config.hidden] * config.layers]
        self.net = equivariant_net(self.space, channels, False, config.dropout)
        read = config.hidden * pooled_size(self.space)
        self.head = mlp([read, HEAD, HEAD, 1], config.dropout)

    def forward(self, networks: CNNs) -> Float[Tensor, " I"]:
        """Predict the logits of the networks' accuracy.

        Raises:
            ValueError: For networks of another architecture.
        """
        expected, found = self.architecture.shapes, set(networks.which.tolist())
        for which in found:
            other = networks.architectures[which]
            if other.shapes != expected or set(other.skips) != {-1}:
                raise ValueError(
                    f"NFN: expected only networks of the architecture {self.architecture}, found "
                    f"{len(found)} architectures, one of them {other}"
                )
        tensors = stacked(networks, torch.arange(len(networks)), next(self.parameters()))
        features = [x.relu() for x in self.net([t[:, None] for t in tensors])]
        return self.head(pooled(self.space, features, torch.mean)).squeeze(1)
