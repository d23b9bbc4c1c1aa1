"""(weight, gradient, momenta) -> features of each parameter, each a plain function.

Features come first in every shape here, parameters last: (F, P).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Raises whenever the features change, so that a checkpoint is never fed what it was not trained on.
FEATURE_VERSION = 2

# Kofinas et al. 2024, section 4.3, after Metz et al. 2022.
MOMENTUM_DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)

# A parameter is seen as its weight, its gradient and its momenta.
NUM_RAW = 2 + len(MOMENTUM_DECAYS)
WEIGHT, GRADIENT = 0, 1
NUM_LOG_SIGN = 2 * NUM_RAW

# The momentum that the nominal step follows, looked ahead by one gradient as Nesterov does.
NOMINAL_DECAY = 0.9
NOMINAL = MOMENTUM_DECAYS.index(NOMINAL_DECAY)

# Andrychowicz et al. 2016, appendix A: logarithms in units of p; linear below e^-p.
LOG_UNIT = 10.0

# Below the square of any gradient that float32 training meets; only keeps 0 / 0 from being NaN.
TINY = 1e-30


def state_type(weight: Tensor) -> torch.dtype:
    """What the state of a weight is kept in: float64 for float64, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


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


def squashed(raw: Float[Tensor, "*P"], scale: Float[Tensor, "*S"]) -> Float[Tensor, "*P"]:
    """Each value x relative to its tensor's RMS, within (-1, 1): x / sqrt(x^2 + scale^2)."""
    return raw * (raw * raw + scale * scale + TINY).rsqrt()


# Newton-Schulz coefficients of Jordan et al. 2024 (Muon): X <- a X + b (X X') X + c (X X')^2 X.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def whitener(gram: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Q with Q M nearly the orthogonal matrix closest to M, from the Gram matrix M M'.

    Every iterate of Muon's Newton-Schulz is a polynomial of M M' times M. Iterating the
    polynomial alone needs only matrices of M's shorter side, and M itself is multiplied once,
    in pieces if need be. (For a tall M give M' M; then it is M Q.) A zero matrix gives a finite
    Q, and with it a zero step.
    """
    a, b, c = NEWTON_SCHULZ
    square = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + TINY
    gram = (gram / square).reshape(-1, *gram.shape[-2:])
    current, q = gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for i in range(NEWTON_SCHULZ_STEPS):
        # b G + c G G, with G the Gram matrix of the current iterate.
        polynomial = torch.baddbmm(current, current, current, beta=b, alpha=c)
        q = torch.baddbmm(q, q, polynomial, beta=a) if i else a * q + polynomial
        current = q @ gram @ q
    return q.view(*square.shape[:-2], *gram.shape[-2:]) * square.rsqrt()


# Up to this size a matrix product takes no longer than the call of it.
SMALL_GRAM = 64


def whiteners(grams: Sequence[Float[Tensor, "_ _ _"]]) -> list[Float[Tensor, "_ _ _"]]:
    """The whiteners of batches of Gram matrices; small ones together, padded to one size.

    A padded Gram matrix has nothing to mix its zeros with, so the part that counts is the same.
    """
    small = [g for g in grams if g.shape[1] <= SMALL_GRAM]
    size = max((g.shape[1] for g in small), default=0)
    padded = [nn.functional.pad(g, (0, size - g.shape[1]) * 2) for g in small]
    together = whitener(torch.cat(padded)).split([len(g) for g in small]) if small else ()
    found = iter(together)
    return [
        next(found)[:, : g.shape[1], : g.shape[1]] if g.shape[1] <= SMALL_GRAM else whitener(g)
        for g in grams
    ]


# Tensor features: five ratios of momentum to gradient, the scale of the weights, size, age, and
# whether the tensor reads the inputs of the network, and whether it writes the outputs.
NUM_ROLES = 2
NUM_TENSOR = len(MOMENTUM_DECAYS) + 3 + NUM_ROLES

# Where the middle of size and age is put: a fan-in and a number of updates as they usually are.
USUAL_FAN_IN, USUAL_AGE = 100, 200


def tensor_features(
    scale: Float[Tensor, "N R"],
    fan_in: Float[Tensor, " N"],
    step: Float[Tensor, " N"],
    roles: Float[Tensor, "N 2"],
) -> Float[Tensor, "N T"]:
    """What all parameters of a tensor share, for N tensors: in units of about 1, around 0.

    A momentum many times its gradient has found a direction; one that grew only as noise adds
    up has not. That is what a step size should depend on, and no parameter can see it alone.
    Momenta of pure noise have a ratio of 0 here.

    Args:
        scale: RMS over the tensor of weight, gradient and momenta.
        fan_in: Values read by one neuron of the tensor, 1 for a vector.
        step: Updates that the tensor had before this one.
        roles: 1 where it reads the network's inputs; 1 where it writes its outputs.
    """
    logs = (scale + TINY).log()
    # Of independent gradients g the momentum sum_k beta^k g_k has an RMS of 1 / sqrt(1 - beta^2).
    noise = scale.new_tensor([-0.5 * math.log(1 - beta * beta) for beta in MOMENTUM_DECAYS])
    ratios = (logs[:, 2:] - logs[:, GRADIENT, None] - noise).clamp(-10, 10)
    weight = logs[:, WEIGHT].clamp(-LOG_UNIT, LOG_UNIT)
    size = (fan_in / USUAL_FAN_IN).log()
    age = ((step + 1) / (USUAL_AGE + 1)).log()
    return torch.cat([ratios / 4, torch.stack([weight, size, age], 1) / 4, roles], 1)
