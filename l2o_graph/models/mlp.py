"""MLPs: linear layers with ReLU between them."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(widths: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Build an MLP from the widths of its input, hidden layers and output.

    ``dropout`` is the rate for each hidden layer.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def linear_maps(inputs: int, hidden: int, count: int) -> list[nn.Module]:
    """Build ``count`` linear maps with ReLU between them."""
    maps: list[nn.Module] = [nn.Linear(inputs, hidden)]
    for _ in range(count - 1):
        maps += [nn.ReLU(), nn.Linear(hidden, hidden)]
    return maps
