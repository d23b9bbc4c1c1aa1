"""(weight, gradient, momenta) -> features of each parameter, each a plain function.

Features come first in every shape here, parameters last: (F, P).
"""

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
    """Let each momentum m take in a gradient: beta m + g, without a factor 1 - beta.

    Args:
        momenta: (5, *shape).
        gradient: (*shape).
    """
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
