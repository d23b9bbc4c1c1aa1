"""Normalisation of weights and biases to mean 0 and standard deviation 1, layer by layer."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean and standard deviation of weights and of biases of each layer.

    They are numbers for layers, not for neurons, because hidden neurons have no order.

    Attributes:
        weight_mean: Mean over all weights of a layer of all networks, for each of L layers.
        weight_std: Standard deviation of these weights.
        bias_mean: Mean over all biases of a layer of all networks.
        bias_std: Standard deviation of these biases.
    """

    weight_mean: Float[Tensor, " L"]
    weight_std: Float[Tensor, " L"]
    bias_mean: Float[Tensor, " L"]
    bias_std: Float[Tensor, " L"]

    @staticmethod
    def neutral(layers: int) -> "Statistics":
        """Create statistics that change nothing: means 0, standard deviations 1."""
        zeros, ones = torch.zeros(layers), torch.ones(layers)
        return Statistics(zeros, ones, zeros.clone(), ones.clone())


def statistics_of(
    weights: Sequence[Float[Tensor, "I _ _"]], biases: Sequence[Float[Tensor, "I _"]]
) -> Statistics:
    """Compute the statistics of a set of networks: the training split, without augmentation.

    Args:
        weights: Weights of each layer, (I, out, in).
        biases: Biases of each layer, (I, out).

    Returns:
        Statistics in float32 on the CPU. The standard deviation is 1 if all numbers are equal, as
        for biases that were never trained.
    """
    of_weights, of_biases = (
        torch.stack([torch.stack(_mean_and_std(layer)) for layer in layers]).float().cpu()
        for layers in (weights, biases)
    )
    return Statistics(*of_weights.unbind(1), *of_biases.unbind(1))


def _mean_and_std(layer: Tensor) -> tuple[Tensor, Tensor]:
    # In float64, for precise means near 0.
    exact = layer.detach().double()
    std = exact.std(correction=0)
    return exact.mean(), torch.where(std > 0, std, 1.0)


class Normalisation(nn.Module):
    """Normalisation by statistics that are stored with the model."""

    weight_mean: Tensor
    weight_std: Tensor
    bias_mean: Tensor
    bias_std: Tensor

    def __init__(self, statistics: Statistics):
        super().__init__()
        names = ("weight_mean", "weight_std", "bias_mean", "bias_std")
        for name, value in zip(names, astuple(statistics), strict=True):
            self.register_buffer(name, value)

    def forward(
        self, weights: Sequence[Float[Tensor, "I _ _"]], biases: Sequence[Float[Tensor, "I _"]]
    ) -> tuple[list[Float[Tensor, "I _ _"]], list[Float[Tensor, "I _"]]]:
        """Normalise each layer."""
        of_weights = zip(weights, self.weight_mean, self.weight_std, strict=True)
        of_biases = zip(biases, self.bias_mean, self.bias_std, strict=True)
        return [(w - m) / s for w, m, s in of_weights], [(b - m) / s for b, m, s in of_biases]
