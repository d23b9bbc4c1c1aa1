"""Features of scalars, (F, n), from parameters, gradients and momenta."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph.layout.tensors import state_type

# Incremented whenever the features change, so that a checkpoint never gets features that it was
# not trained on.
FEATURE_VERSION = 3

# Kofinas et al. 2024, section 4.3, after Metz et al. 2022.
MOMENTUM_DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)

# Features are logarithm and sign of the weight, the gradient and each momentum.
NUM_RAW = 2 + len(MOMENTUM_DECAYS)
NUM_FEATURES = 2 * NUM_RAW

# Andrychowicz et al. 2016, appendix A: logarithms in units of p; linear below e^-p.
LOG_UNIT = 10.0


def zero_momenta(weight: Tensor) -> Tensor:
    """Create momenta before the first step, (5, *weight.shape)."""
    return weight.new_zeros((len(MOMENTUM_DECAYS), *weight.shape), dtype=state_type(weight))


def next_momenta(momenta: Tensor, gradient: Tensor) -> Tensor:
    """Update momenta (5, *shape) with a gradient: beta m + g, without a factor 1 - beta."""
    decays = torch.tensor(MOMENTUM_DECAYS, dtype=momenta.dtype, device=momenta.device)
    return momenta * decays.view(-1, *[1] * gradient.dim()) + gradient


def log_sign(raw: Float[Tensor, "R P"]) -> Float[Tensor, "two_R P"]:
    """Compute logarithm and sign of each value, log rows first (Andrychowicz et al. 2016, app. A).

    (log|x| / p, sign x) where |x| >= e^-p, else (-1, e^p x), with p = 10.
    """
    smallest = torch.e**-LOG_UNIT
    magnitude = raw.abs()
    # The clamp makes log|x| / p exactly -1 below e^-p, and x / e^-p clamped to [-1, 1] is the sign.
    logarithm = magnitude.clamp(min=smallest).log() / LOG_UNIT
    return torch.cat([logarithm, (raw / smallest).clamp(-1, 1)])


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive scalars of one parameter, a grid of cells with K positions each.

    A cell of a kernel is an edge; a cell of a bias or a loose parameter is a single scalar.

    Attributes:
        parameter: Index of the parameter.
        start: Index of the first scalar in the flattened parameter.
        stop: Index after the last scalar.
        positions: Spatial shape of a cell; () for a single scalar.
        read_only: Whether these scalars are updated elsewhere, or never.
    """

    parameter: int
    start: int
    stop: int
    positions: tuple[int, ...]
    read_only: bool = False

    @property
    def size(self) -> int:
        """Number of scalars."""
        return self.stop - self.start

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.size // math.prod(self.positions)


@dataclass(frozen=True, slots=True)
class Scalars:
    """Features (F, n) of the scalars of several parts, concatenated."""

    parts: tuple[Span, ...]
    x: Float[Tensor, "F n"]


def raw_numbers(
    parameter: Tensor, gradient: Tensor, momenta: Tensor, dtype: torch.dtype
) -> Float[Tensor, "R n"]:
    """Stack weight, gradient and momenta (5, *shape) of a parameter of any shape as rows."""
    rows = parameter.reshape(1, -1), gradient.reshape(1, -1), momenta.reshape(len(momenta), -1)
    return torch.cat([row.to(dtype) for row in rows])


def scalars_of(raw: Sequence[Float[Tensor, "R _"]], parts: Sequence[Span]) -> Scalars:
    """Compute the features of some parts' scalars: 7 logarithms and 7 signs."""
    seen = [raw[part.parameter][:, part.start : part.stop] for part in parts]
    return Scalars(tuple(parts), log_sign(torch.cat(seen, dim=1)))
