"""Linear layers with ReLU between them: a head, or the whole of a model."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(widths: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """A small network, by the widths of its input, hidden layers and output.

    In training, a share ``dropout`` of each hidden layer is left out.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def linear_maps(inputs: int, hidden: int, count: int) -> list[nn.Module]:
    """So many linear maps with a ReLU between each two."""
    maps: list[nn.Module] = [nn.Linear(inputs, hidden)]
    for _ in range(count - 1):
        maps += [nn.ReLU(), nn.Linear(hidden, hidden)]
    return maps
