"""Networks of equivariant linear layers on weight spaces, and pooling to invariant features.

Features of I networks are (I, C, *shape) for each parameter: C numbers for each scalar.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.models.equivariant import EquivariantLinear, TensorSpec

Features = Sequence[Float[Tensor, "I C ..."]]


class Activation(nn.Module):
    """Norm, ReLU and dropout of features with C channels.

    The norm is ``BatchNorm1d`` on each tensor's channels, over networks and all entries. It
    commutes with permutations, also with a different one for each network. It needs at least two
    networks in training, and only in training does a network's result depend on its batch. Dropout
    drops whole channels of a tensor: single entries would hardly matter, as layers read means.
    """

    def __init__(self, tensors: int, channels: int, norm: bool, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(channels) if norm else nn.Identity() for _ in range(tensors)
        )
        self.drop = nn.Dropout1d(dropout)

    def forward(self, features: Features) -> list[Float[Tensor, "I C ..."]]:
        """Apply norm, ReLU and dropout to each tensor."""
        pairs = zip(self.norms, features, strict=True)
        return [self.drop(norm(x.flatten(2)).relu()).view(x.shape) for norm, x in pairs]


def equivariant_net(
    space: Sequence[TensorSpec], channels: Sequence[int], norm: bool, dropout: float
) -> nn.Sequential:
    """Build equivariant linear layers with an ``Activation`` between each two.

    ``channels`` are those of the inputs, of each hidden layer, and of the outputs.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers.append(EquivariantLinear(space, before, after))
        layers.append(Activation(len(space), after, norm, dropout))
    return nn.Sequential(*layers[:-1])


Reduce = Callable[[Tensor, tuple[int, ...]], Tensor]


def pooled(space: Sequence[TensorSpec], features: Features, reduce: Reduce) -> Float[Tensor, "I F"]:
    """Reduce features over permutable axes, by ``torch.mean`` or ``torch.amax``.

    Fixed axes become additional features: F = C times ``pooled_size(space)``.
    """
    answer = []
    for spec, x in zip(space, features, strict=True):
        free = tuple(2 + a for a, axis in enumerate(spec.axes) if axis.permutable)
        answer.append((reduce(x, free) if free else x).flatten(1))
    return torch.cat(answer, dim=1)


def pooled_size(space: Sequence[TensorSpec]) -> int:
    """Return how many numbers ``pooled`` keeps of each channel."""
    return sum(torch.Size(spec.fixed_shape).numel() for spec in space)
