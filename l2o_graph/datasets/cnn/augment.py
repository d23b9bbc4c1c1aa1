"""Random changes to CNNs that leave their accuracy about what it was (Zhou et al. 2023)."""

from dataclasses import replace

import torch
from torch import Tensor

from l2o_graph.datasets.cnn.files import CNNs, stacked
from l2o_graph.datasets.inr.augment import DROPOUT, NOISE, dropped, noisy


def augmented(networks: CNNs, generator: torch.Generator) -> CNNs:
    """Put noise on every parameter of every network, then set a hundredth of them to 0.

    Noise has a tenth of the standard deviation of the tensor. What survives keeps its value, where
    the released code's grows by 1 / (1 - rate).

    Args:
        networks: Left as they are.
        generator: Where the random numbers come from; the same gives the same.

    Returns:
        The networks with other parameters, in new tensors.

    Source:
        Zhou et al., "Permutation Equivariant Neural Functionals", 2023.
    """
    values: list[Tensor] = list(networks.values)
    for which in networks.which.unique().tolist():
        own = (networks.which == which).nonzero().flatten()
        tensors = stacked(networks, own, networks.values[0])
        changed = [dropped(noisy(t, NOISE, generator), DROPOUT, generator) for t in tensors]
        rows = torch.cat([t.flatten(1) for t in changed], dim=1)
        for i, row in zip(own.tolist(), rows, strict=True):
            values[i] = row
    return replace(networks, values=tuple(values))
