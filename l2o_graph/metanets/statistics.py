"""Weights and biases brought to mean 0 and deviation 1, layer by layer, before they are read."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean and standard deviation of weights and of biases, layer by layer.

    One number a layer, never one a neuron: hidden neurons have no order.

    Attributes:
        weight_mean: Mean over all weights of a layer of all networks, for each of L layers.
        weight_std: Standard deviation over the same.
        bias_mean: Mean over all biases of a layer of all networks.
        bias_std: Standard deviation over the same.
    """

    weight_mean: Float[Tensor, " L"]
    weight_std: Float[Tensor, " L"]
    bias_mean: Float[Tensor, " L"]
    bias_std: Float[Tensor, " L"]

    @staticmethod
    def neutral(layers: int) -> "Statistics":
        """Make statistics that leave all numbers as they are: means 0, standard deviations 1."""
        zeros, ones = torch.zeros(layers), torch.ones(layers)
        return Statistics(zeros, ones, zeros.clone(), ones.clone())


def statistics_of(
    weights: Sequence[Float[Tensor, "I _ _"]], biases: Sequence[Float[Tensor, "I _"]]
) -> Statistics:
    """Take the statistics of a set of networks: of the training split, before it is changed.

    Args:
        weights: Weights of each layer, (I, out, in).
        biases: Biases of each layer, (I, out).

    Returns:
        Statistics in float32 on the CPU. Numbers that are all the same, as biases that were never
        trained, get a standard deviation of 1.
    """
    of_weights, of_biases = (
        torch.stack([torch.stack(_mean_and_std(layer)) for layer in layers]).float().cpu()
        for layers in (weights, biases)
    )
    return Statistics(*of_weights.unbind(1), *of_biases.unbind(1))


def _mean_and_std(layer: Tensor) -> tuple[Tensor, Tensor]:
    # In float64, where a mean next to 0 beside a deviation of 0.1 keeps its digits.
    exact = layer.detach().double()
    std = exact.std(correction=0)
    return exact.mean(), torch.where(std > 0, std, 1.0)


class Normalisation(nn.Module):
    """Statistics as a part of a model, stored with it."""

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
        """Normalise every layer by its own numbers."""
        of_weights = zip(weights, self.weight_mean, self.weight_std, strict=True)
        of_biases = zip(biases, self.bias_mean, self.bias_std, strict=True)
        return [(w - m) / s for w, m, s in of_weights], [(b - m) / s for b, m, s in of_biases]
