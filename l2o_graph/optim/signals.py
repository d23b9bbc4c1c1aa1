"""Sums over gradients, averages and weights -> what the controller sees of each row.

All signals are free of scale: they stay as they are when weights are reparametrised, when the loss
is multiplied, and when a network is wider. Axes as in ``controller``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o_graph.optim.blocks import KINDS

# Decays of the averages of a gradient that a direction is mixed from.
FAST, SLOW = 0.9, 0.99
# Decays of the averages of a cosine; the first is all but the present one.
COSINE_DECAYS = (0.5, 0.9, 0.99)

# In the order of ``observe``: cosines, ratios, of the network, length and weights, age, kind.
NUM_SIGNALS = 6 + 5 + 3 + 3 + 1 + len(KINDS)

# Part of the typical update in its matrix from which on that of a row says something.
LEAST_UPDATE = 1e-6
# Far below any square that matters; only keeps 0 / 0 from being NaN.
TINY = 1e-37
# Ratios end here.
MOST = 3.0
# Signals count so much that the same weight of any of them does about as much for how a run ends:
# evolution strategies perturb all weights alike, and do not see what does next to nothing. Cosines
# are small, the more so the longer they are averaged.
COSINE_UNITS = (6.0, 10.0, 14.0)
OF_WEIGHT_UNIT, LOG_LENGTH_UNIT, GROWTH_UNIT = 1 / 8, 1 / 4, 1 / 2
AGE_UNIT, KIND_UNIT = 1 / 2, 1 / 2
# The age beyond which steps look alike: runs of meta-training are not much longer.
OLDEST = 4000.0
# Units of lengths grow with weights up to so many times the first ones.
MOST_GROWTH = 20.0


@dataclass(slots=True)
class Sums:
    """Sums over the scalars of each row.

    Attributes:
        against: (N, R) gradient times last update.
        squares: (5, N, R) squares of the fast average, the slow average, the last update, the
            gradient and the weights.
    """

    against: Tensor
    squares: Tensor


FAST_ROW, SLOW_ROW, UPDATE_ROW, GRADIENT_ROW, WEIGHT_ROW = range(5)


def cosine(against: Tensor, gradient: Tensor, last: Tensor) -> Tensor:
    """Cosine between the gradient and the direction that the last step went down.

    Positive: the step could have been longer; negative: it went too far; 0 before the first, and
    where squares are too small for their type, as those of neurons that are all but dead.
    The hypergradient of Baydin et al. 2017, with its scale taken out.

    Args:
        against: Sums of their products.
        gradient: Sums of squares.
        last: Sums of squares of the last update.
    """
    found = -against / (gradient.sqrt() * last.sqrt() + TINY)
    return torch.where(gradient > TINY, found.clamp(-1, 1), 0.0)


def corrected(age: Tensor, decay: float) -> Tensor:
    """1 - decay^(age + 1): by this an average that began at 0 is too small."""
    return 1 - decay ** (age + 1)


@dataclass(slots=True)
class History:
    """What the signals of a step need of the steps before it.

    Attributes:
        rows: (6, N, R): logarithm of the step length; averages of each row's cosine at three
            decays; squares of the gradient at the last step, and at the first that had any.
        tensors: (4, N, T): averages of each matrix's cosine; logarithm of the first unit of
            its lengths.
        ages: (T,) steps before this one.
    """

    rows: Tensor
    tensors: Tensor
    ages: Tensor


@dataclass(slots=True)
class Constants:
    """What stays the same from step to step.

    Attributes:
        tensor_of_row: (R,) index of the matrix that a row is of.
        scalars_of_row: (R,) number of scalars of each row.
        rows_of_tensor: (T,) number of rows of each matrix.
        scalars_of_tensor: (T,) number of scalars of each matrix.
        log_torch_rms: (T,) logarithm of the RMS that torch begins weights with, 1 / sqrt(3 fan-in).
        is_matrix: (T,) whether a matrix is one.
        kinds: (R, 6) indicators of what a row's block is.
        log_relative_unit: (T,) logarithm of the unit of its lengths in units of its weights, -inf
            where these say nothing.
        log_absolute_unit: (T,) logarithm of the unit of its lengths otherwise.
        decay_unit: (T,) relative unit of matrices whose weights decay, 0 of others.
        cosine_weights: (3, 1, 1) weight of a new cosine in its averages.
        cosine_units: (3, 1, 1) factor of each average of cosines.
        average_weights: (2, 1, 1, 1) weight of a new gradient in the fast and slow average.
        above: (5,) row of the square above in each of the ``RATIOS``.
        below: (5,) row of the square below.
        ratio_units: (5, 1, 1) factors of the logarithms of ratios of squares.
    """

    tensor_of_row: Tensor
    scalars_of_row: Tensor
    rows_of_tensor: Tensor
    scalars_of_tensor: Tensor
    log_torch_rms: Tensor
    is_matrix: Tensor
    kinds: Tensor
    log_relative_unit: Tensor
    log_absolute_unit: Tensor
    decay_unit: Tensor
    cosine_weights: Tensor
    cosine_units: Tensor
    average_weights: Tensor
    above: Tensor
    below: Tensor
    ratio_units: Tensor


LOG_LENGTH, ROW_COSINES, LAST_SQUARE, FIRST_SQUARE = 0, slice(1, 4), 4, 5
TENSOR_COSINES, FIRST_LOG_UNIT, RECENT_SQUARE, LONG_SQUARE = slice(0, 3), 3, 4, 5
NUM_OF_ROW, NUM_OF_TENSOR = 6, 6


def pooled(rows: Tensor, tensor_of_row: Tensor, tensors: int) -> Tensor:
    """Sums over the rows of each matrix: (*, N, R) -> (*, N, T)."""
    answer = rows.new_zeros(*rows.shape[:-1], tensors)
    return answer.index_add_(-1, tensor_of_row, rows)


def log_unit(weight: Tensor, constants: "Constants") -> Tensor:
    """Logarithm of the unit of a matrix's lengths, by its weights: (N, T).

    A part of their RMS; for vectors, and where all weights are 0, what it would be on layers as
    torch begins them, whose weights have an RMS of 1 / sqrt(3 fan-in), in units of how much larger
    or smaller the kernels of this network begin.

    Args:
        weight: (N, T) sums of squares.
        constants: Constants of the network.
    """
    rms = (weight / constants.scalars_of_tensor).sqrt()
    log_rms = rms.clamp(min=1e-30).log()
    counts = ((rms > 0) & constants.is_matrix).to(rms)
    of_torch = (log_rms - constants.log_torch_rms) * counts
    network = of_torch.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
    known = (rms > 0) & constants.log_relative_unit.isfinite()
    relative = log_rms + constants.log_relative_unit
    return torch.where(known, relative, network + constants.log_absolute_unit)


def log_growth(weight: Tensor, history: History, constants: Constants) -> Tensor:
    """Logarithm of how much larger than its first one the unit of a matrix has become, (N, T).

    Networks that begin small spend their first steps on growing, and what is a long step for the
    first weights is a short one for the later ones. Units do not shrink with weights.

    Args:
        weight: (N, T) sums of squares.
        history: Knows the first units.
        constants: Constants of the network.
    """
    grown = log_unit(weight, constants) - history.tensors[FIRST_LOG_UNIT]
    return grown.clamp(0, math.log(MOST_GROWTH))


# Pairs of sums of squares whose ratios are signals, as rows of ``Sums.squares`` and then of what
# the history has of the gradient; and the units of their logarithms.
RATIOS = (
    (FAST_ROW, GRADIENT_ROW, 2.0),
    (SLOW_ROW, GRADIENT_ROW, 2.0),
    (SLOW_ROW, FAST_ROW, 1.0),
    (GRADIENT_ROW, 5, 1.0),  # the last gradient
    (GRADIENT_ROW, 6, 3.0),  # the first one
)
GROWTH = 3


def observe(
    sums: Sums,
    history: History,
    constants: Constants,
    growth: Tensor,
) -> Tensor:
    """Signals of each row; the history takes in this step's gradient, in place.

    Args:
        sums: Over each row, the gradient being this step's.
        history: History of the steps before.
        constants: Constants of the network.
        growth: (N, T) see ``log_growth``.

    Returns:
        (N, R, F).
    """
    of_row, count = constants.tensor_of_row, len(constants.rows_of_tensor)
    squares, ages = sums.squares, history.ages
    of_tensor = pooled(
        torch.stack([sums.against, squares[GRADIENT_ROW], squares[UPDATE_ROW]]), of_row, count
    )
    # What a row went by mixing with others alone is rounding, and so would be its cosine.
    typical = of_tensor[2] / constants.rows_of_tensor
    last = squares[UPDATE_ROW] + LEAST_UPDATE**2 * typical[:, of_row]
    new_rows = cosine(sums.against, squares[GRADIENT_ROW], last)
    row_averages, tensor_averages = history.rows[ROW_COSINES], history.tensors[TENSOR_COSINES]
    row_averages.lerp_(new_rows.expand_as(row_averages), constants.cosine_weights)
    tensor_averages.lerp_(cosine(*of_tensor).expand_as(tensor_averages), constants.cosine_weights)
    # The first cosine is 0 by definition, so that n steps have made n - 1 of them.
    made = 1 - (1 - constants.cosine_weights) ** ages.clamp(min=1)  # (3, 1, T)
    unit = constants.cosine_units / made
    tensor_cosines = tensor_averages * unit
    row_cosines = row_averages * unit[:, :, of_row]
    gradient = squares[GRADIENT_ROW]
    before = history.rows[LAST_SQUARE:]
    before = torch.where(before > 0, before, gradient)
    # What averages began with as 0 they are too small by.
    correction = torch.stack([corrected(ages, FAST), corrected(ages, SLOW)])[:, None, of_row]
    means = squares[:2] / correction.square()
    known = torch.cat([means, squares[2:], before])
    logs = (known + TINY).log()
    ratios = logs[constants.above] - logs[constants.below]
    ratios = (ratios * constants.ratio_units).clamp(-MOST, MOST)
    of_gradient = pooled(ratios[GROWTH], of_row, count) / constants.rows_of_tensor
    of_network = torch.cat([tensor_cosines[1:], of_gradient[None]]).mean(-1, keepdim=True)
    log_length = history.rows[LOG_LENGTH]
    log_weight = 0.5 * (logs[WEIGHT_ROW] - constants.scalars_of_row.log())
    log_units = history.tensors[FIRST_LOG_UNIT] + growth
    of_weight = log_length + log_units[:, of_row] - log_weight
    age = AGE_UNIT * (((ages + 1).clamp(max=OLDEST) / 100).log() / 3)[of_row]
    signals = torch.cat(
        [
            row_cosines,
            tensor_cosines[:, :, of_row],
            ratios,
            of_network.expand(-1, -1, len(of_row)),
            (OF_WEIGHT_UNIT * of_weight).clamp(-MOST, MOST)[None],
            LOG_LENGTH_UNIT * log_length[None],
            GROWTH_UNIT * growth[None, :, of_row],
            age.expand_as(log_length)[None],
            KIND_UNIT * constants.kinds.T[:, None].expand(-1, log_length.shape[0], -1),
        ]
    )
    history.rows[LAST_SQUARE] = gradient
    history.rows[FIRST_SQUARE] = before[1]
    return signals.movedim(0, -1)


def remaining(horizon: Tensor, ages: Tensor) -> Tensor:
    """Fraction of the run that is still ahead, this step included: (N, 1), above 0."""
    length = horizon[:, None].clamp(min=1)
    return torch.maximum(1 - ages.amax() / length, 1 / length)
