"""An MLP on the flattened parameters of a network, which ignores its symmetries."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.metanets.inr_config import INRModelConfig
from l2o_graph.models.mlp import mlp

Weights = Sequence[Float[Tensor, "I _ _"]]
Biases = Sequence[Float[Tensor, "I _"]]
Deltas = tuple[list[Float[Tensor, "I _ _"]], list[Float[Tensor, "I _"]]]


def flattened(weights: Weights, biases: Biases) -> Float[Tensor, "I P"]:
    """Flatten the weights of all layers, then the biases of all layers."""
    return torch.cat([t.flatten(1) for t in (*weights, *biases)], dim=1)


def unflattened(row: Float[Tensor, "I P"], weights: Weights, biases: Biases) -> Deltas:
    """Undo ``flattened``, to tensors of the shapes of ``weights`` and ``biases``."""
    like = (*weights, *biases)
    parts = row.split([t.shape[1:].numel() for t in like], dim=1)
    tensors = [part.view(t.shape) for part, t in zip(parts, like, strict=True)]
    return tensors[: len(weights)], tensors[len(weights) :]


class FlatMLP(nn.Module):
    """MLP from P flattened parameters to logits (Navon et al. 2023) or P deltas (Zhou et al.).

    Args:
        config: Configuration of the model, with ``layers`` hidden layers.
    """

    def __init__(self, config: INRModelConfig):
        super().__init__()
        count = sum(outputs * (inputs + 1) for inputs, outputs in pairwise(config.layout))
        self.edits = config.task == "edit"
        hidden = [config.hidden] * config.layers
        self.net = mlp([count, *hidden, count if self.edits else config.classes], config.dropout)

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I classes"] | Deltas:
        """Compute logits or deltas."""
        answer = self.net(flattened(weights, biases))
        return unflattened(answer, weights, biases) if self.edits else answer
