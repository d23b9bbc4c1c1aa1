"""StatNN: a network on statistics of each layer (Unterthiner et al. 2020).

Of the weights of a layer, and of its biases: mean, variance, and the quantiles 0, 1/4, 1/2, 3/4
and 1. No order of neurons changes them, nor what neurons belong together.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.models.mlp import mlp

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
STATISTICS = 2 + len(QUANTILES)


def statistics(x: Float[Tensor, "I ..."]) -> Float[Tensor, "I 7"]:
    """Mean, variance and five quantiles of each network's scalars.

    The variance is the unbiased one, and 0 of a single scalar, which leaves that undefined.
    Quantiles between two scalars are interpolated.
    """
    # Not torch.quantile, which refuses more than 2^24 scalars: those of 16,000 INRs.
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
    """Statistics of all layers, dense or convolutional, beside each other, F = 14 a layer.

    There is room for ``layers`` of them: those that the networks do not have are zeros.

    Raises:
        ValueError: For networks of more layers.
    """
    if len(weights) > layers:
        raise ValueError(f"StatNN: expected at most {layers} layers, found {len(weights)}")
    tensors = [t for pair in zip(weights, biases, strict=True) for t in pair]
    found = torch.cat([statistics(t) for t in tensors], dim=1)
    return nn.functional.pad(found, (0, 2 * STATISTICS * layers - found.shape[1]))


class StatNN(nn.Module):
    """Two hidden layers on the statistics of at most ``layers`` layers.

    Networks of different depth make one batch as rows of ``layer_statistics``, for ``head``.

    Args:
        layers: Layers of the deepest network; 6 in Kofinas et al. 2024, section 4.2.
        outputs: Numbers to answer with: 1 for an accuracy, as many as classes for logits.
        hidden: Width.
        dropout: Share of each hidden layer that is dropped in training.
    """

    def __init__(self, layers: int, outputs: int = 1, hidden: int = 1000, dropout: float = 0.0):
        super().__init__()
        self.layers = layers
        self.head = mlp([2 * STATISTICS * layers, hidden, hidden, outputs], dropout)

    def forward(
        self, weights: Sequence[Float[Tensor, "I ..."]], biases: Sequence[Float[Tensor, "I _"]]
    ) -> Float[Tensor, "I outputs"]:
        """Answer for networks of one architecture; see ``layer_statistics``."""
        return self.head(layer_statistics(weights, biases, self.layers))
