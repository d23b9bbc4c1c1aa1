"""(parameters, gradients, momenta) -> the features of any run of scalars, features first: (F, P).

What a step sees of a parameter are views of its tensors. The features of its scalars are made where
they are used, for one chunk at a time.
"""

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


def decays_for(momenta: Tensor) -> Tensor:
    """The five decays, shaped to multiply momenta of shape (5, *shape)."""
    decays = torch.tensor(MOMENTUM_DECAYS, dtype=momenta.dtype, device=momenta.device)
    return decays.view(-1, *[1] * (momenta.dim() - 1))


def next_momenta(momenta: Tensor, gradient: Tensor) -> Tensor:
    """Let momenta (5, *shape) take in a gradient: beta m + g, without a factor 1 - beta."""
    return momenta * decays_for(momenta) + gradient


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


@dataclass(frozen=True, slots=True)
class Scalars:
    """Features (F, n) of the scalars of several parts, one part after the other."""

    parts: tuple[Span, ...]
    x: Float[Tensor, "F n"]


@dataclass(frozen=True, slots=True)
class ParameterView:
    """One parameter as a step sees it: weight, gradient and momenta, flattened."""

    weight: Float[Tensor, " n"]
    gradient: Float[Tensor, " n"]
    momenta: Float[Tensor, "B n"]

    def raw(self, start: int, stop: int) -> Float[Tensor, "R n"]:
        """Weight, gradient and momenta of the scalars from start to stop."""
        momenta = self.momenta[:, start:stop]
        return torch.cat([self.weight[None, start:stop], self.gradient[None, start:stop], momenta])


def view_parameters(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[ParameterView]:
    """View parameters, differentiably where gradients are enabled.

    Args:
        parameters: Tensors of any shape.
        gradients: Their gradients.
        momenta: Their momenta, (5, *shape) each, this gradient included.
        dtype: What to compute in.
    """
    return [
        ParameterView(
            p.reshape(-1).to(dtype),
            g.reshape(-1).to(dtype),
            (m.flatten(1) if m.dim() > 1 else m[:, None]).to(dtype),
        )
        for p, g, m in zip(parameters, gradients, momenta, strict=True)
    ]


def scalars_of(views: Sequence[ParameterView], parts: Sequence[Span]) -> Scalars:
    """The features of some parts' scalars: 7 logarithms and 7 signs."""
    if not parts:
        return Scalars((), views[0].weight.new_zeros(NUM_FEATURES, 0))
    raw = [views[part.parameter].raw(part.start, part.stop) for part in parts]
    return Scalars(tuple(parts), log_sign(torch.cat(raw, dim=1)))
