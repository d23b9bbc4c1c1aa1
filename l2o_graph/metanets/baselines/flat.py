"""All parameters of a network in a row, and an MLP on them, to which their order is everything."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.models.mlp import mlp

Weights = Sequence[Float[Tensor, "I _ _"]]
Biases = Sequence[Float[Tensor, "I _"]]
Deltas = tuple[list[Float[Tensor, "I _ _"]], list[Float[Tensor, "I _"]]]


def flattened(weights: Weights, biases: Biases) -> Float[Tensor, "I P"]:
    """The weights of all layers, then the biases of all layers."""
    return torch.cat([t.flatten(1) for t in (*weights, *biases)], dim=1)


def unflattened(row: Float[Tensor, "I P"], weights: Weights, biases: Biases) -> Deltas:
    """The way back, to tensors of the shapes of the last two."""
    like = (*weights, *biases)
    parts = row.split([t.shape[1:].numel() for t in like], dim=1)
    tensors = [part.view(t.shape) for part, t in zip(parts, like, strict=True)]
    return tensors[: len(weights)], tensors[len(weights) :]


def parameter_count(layout: Sequence[int]) -> int:
    """P of networks of given widths."""
    return sum(outputs * (inputs + 1) for inputs, outputs in pairwise(layout))


class MLPClassifier(nn.Module):
    """An MLP on the flattened parameters (Navon et al. 2023).

    Args:
        layout: Widths of the networks, from input to output.
        classes: How many logits to answer with.
        hidden: Width.
        layers: Hidden layers.
        dropout: Share of each that is dropped in training.
    """

    def __init__(
        self,
        layout: Sequence[int],
        classes: int = 10,
        hidden: int = 256,
        layers: int = 3,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.net = mlp([parameter_count(layout), *[hidden] * layers, classes], dropout)

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I classes"]:
        """Logits of each network."""
        return self.net(flattened(weights, biases))


class MLPEditor(nn.Module):
    """An MLP from the flattened parameters to as many deltas (Zhou et al. 2023).

    Args:
        layout: Widths of the networks, from input to output.
        hidden: Width.
        layers: Hidden layers.
        dropout: Share of each that is dropped in training.
    """

    def __init__(
        self, layout: Sequence[int], hidden: int = 256, layers: int = 3, dropout: float = 0.0
    ):
        super().__init__()
        count = parameter_count(layout)
        self.net = mlp([count, *[hidden] * layers, count], dropout)

    def forward(self, weights: Weights, biases: Biases) -> Deltas:
        """Deltas of weights and of biases."""
        return unflattened(self.net(flattened(weights, biases)), weights, biases)
