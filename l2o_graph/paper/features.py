"""(parameters, gradients, momenta) -> the features of runs of scalars, features first: (F, n)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph.layout.tensors import state_type

# Raised whenever what rules read changes, so that a checkpoint is never fed what it was not
# trained on.
FEATURE_VERSION = 3

# Kofinas et al. 2024, section 4.3, after Metz et al. 2022.
MOMENTUM_DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)

# A parameter is seen as its weight, its gradient and its momenta; of each a logarithm and a sign.
NUM_RAW = 2 + len(MOMENTUM_DECAYS)
NUM_FEATURES = 2 * NUM_RAW

# Andrychowicz et al. 2016, appendix A: logarithms in units of p; linear below e^-p.
LOG_UNIT = 10.0


def zero_momenta(weight: Tensor) -> Tensor:
    """Momenta before the first step: (5, *weight.shape)."""
    return weight.new_zeros((len(MOMENTUM_DECAYS), *weight.shape), dtype=state_type(weight))


def next_momenta(momenta: Tensor, gradient: Tensor) -> Tensor:
    """Let momenta (5, *shape) take in a gradient: beta m + g, without a factor 1 - beta."""
    decays = torch.tensor(MOMENTUM_DECAYS, dtype=momenta.dtype, device=momenta.device)
    return momenta * decays.view(-1, *[1] * gradient.dim()) + gradient


def log_sign(raw: Float[Tensor, "R P"]) -> Float[Tensor, "two_R P"]:
    """Logarithm and sign of each value, log rows first (Andrychowicz et al. 2016, appendix A).

    (log|x| / p, sign x) where |x| >= e^-p, else (-1, e^p x), with p = 10.
    """
    smallest = torch.e**-LOG_UNIT
    magnitude = raw.abs()
    # The clamp makes log|x| / p exactly -1 below e^-p, and x / e^-p clamped to [-1, 1] is the sign.
    logarithm = magnitude.clamp(min=smallest).log() / LOG_UNIT
    return torch.cat([logarithm, (raw / smallest).clamp(-1, 1)])


@dataclass(frozen=True, slots=True)
class Span:
    """A run of scalars of one parameter, a grid of cells with K positions each.

    A cell of a kernel is an edge; of a bias or a loose parameter it is a single scalar.

    Attributes:
        parameter: Index of the parameter.
        start: First scalar of the run within the flattened parameter.
        stop: End of the run.
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
        """Scalars in all."""
        return self.stop - self.start

    @property
    def cells(self) -> int:
        """Cells in all."""
        return self.size // math.prod(self.positions)


@dataclass(frozen=True, slots=True)
class Scalars:
    """Features (F, n) of the scalars of several parts, one part after the other."""

    parts: tuple[Span, ...]
    x: Float[Tensor, "F n"]


def raw_numbers(
    parameter: Tensor, gradient: Tensor, momenta: Tensor, dtype: torch.dtype
) -> Float[Tensor, "R n"]:
    """A parameter as a step sees it, of any shape: weight, gradient and momenta (5, *shape)."""
    rows = parameter.reshape(1, -1), gradient.reshape(1, -1), momenta.reshape(len(momenta), -1)
    return torch.cat([row.to(dtype) for row in rows])


def scalars_of(raw: Sequence[Float[Tensor, "R _"]], parts: Sequence[Span]) -> Scalars:
    """The features of some parts' scalars, from all parameters: 7 logarithms and 7 signs."""
    seen = [raw[part.parameter][:, part.start : part.stop] for part in parts]
    return Scalars(tuple(parts), log_sign(torch.cat(seen, dim=1)))
