"""Data augmentation of CNNs that about preserves their accuracy (Zhou et al. 2023)."""

from dataclasses import replace

import torch
from torch import Tensor

from l2o_graph.datasets.cnn.files import CNNs, stacked
from l2o_graph.datasets.inr.augment import DROPOUT, NOISE, dropped, noisy


def augmented(networks: CNNs, generator: torch.Generator) -> CNNs:
    """Add noise to all parameters, then set 1 % of them to 0.

    Noise has a tenth of the standard deviation of the tensor. Remaining parameters are not
    rescaled; the released code multiplies them by 1 / (1 - rate).

    Args:
        networks: Networks, which are not modified.
        generator: Random number generator.

    Returns:
        Networks with the changed parameters, in new tensors.

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
