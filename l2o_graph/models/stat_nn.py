"""StatNN: an MLP on statistics of each layer (Unterthiner et al. 2020).

Statistics of the weights of a layer, and of its biases, are mean, variance, and the quantiles 0,
1/4, 1/2, 3/4 and 1. They do not depend on the order of neurons, nor on which weights belong to
the same neuron.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.models.mlp import mlp

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
STATISTICS = 2 + len(QUANTILES)


def statistics(x: Float[Tensor, "I ..."]) -> Float[Tensor, "I 7"]:
    """Compute mean, variance and five quantiles of each network's scalars.

    The variance is unbiased, and 0 for a single scalar. Quantiles are interpolated.
    """
    # torch.quantile refuses more than 2^24 scalars, those of 16,000 INRs.
    ordered = x.flatten(1).sort(1).values
    last = ordered.shape[1] - 1
    place = last * torch.tensor(QUANTILES, dtype=ordered.dtype, device=ordered.device)
    below, above = ordered[:, place.floor().long()], ordered[:, place.ceil().long()]
    quantiles = torch.lerp(below, above, place.frac())
    mean, variance = ordered.mean(1), ordered.var(1, correction=min(1, last))
    return torch.cat([mean[:, None], variance[:, None], quantiles], dim=1)


def layer_statistics(
    weights: Sequence[Float[Tensor, "I ..."]], biases: Sequence[Float[Tensor, "I _"]], layers: int
) -> Float[Tensor, "I F"]:
    """Concatenate the statistics of all layers, dense or convolutional, 14 for each layer.

    They are padded with zeros to those of ``layers`` layers.

    Raises:
        ValueError: For networks with more layers.
    """
    if len(weights) > layers:
        raise ValueError(f"StatNN: expected at most {layers} layers, found {len(weights)}")
    tensors = [t for pair in zip(weights, biases, strict=True) for t in pair]
    found = torch.cat([statistics(t) for t in tensors], dim=1)
    return nn.functional.pad(found, (0, 2 * STATISTICS * layers - found.shape[1]))


class StatNN(nn.Module):
    """MLP with two hidden layers on the statistics of at most ``layers`` layers.

    For a batch of networks of different depth, apply ``head`` to rows of ``layer_statistics``.

    Args:
        layers: Number of layers of the deepest network; 6 in Kofinas et al. 2024, section 4.2.
        outputs: Number of outputs: 1 for an accuracy, the number of classes for logits.
        hidden: Width of hidden layers.
        dropout: Dropout rate of each hidden layer.
    """

    def __init__(self, layers: int, outputs: int = 1, hidden: int = 1000, dropout: float = 0.0):
        super().__init__()
        self.layers = layers
        self.head = mlp([2 * STATISTICS * layers, hidden, hidden, outputs], dropout)

    def forward(
        self, weights: Sequence[Float[Tensor, "I ..."]], biases: Sequence[Float[Tensor, "I _"]]
    ) -> Float[Tensor, "I outputs"]:
        """Compute outputs for networks of one architecture; see ``layer_statistics``."""
        return self.head(layer_statistics(weights, biases, self.layers))
