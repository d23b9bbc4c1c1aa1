"""Signals that the controller reads for each row, from sums over gradients, momenta and weights.

All signals are scale-free: they do not change if weights or loss are given in other units, or if a
network is wider. Axes as in ``controller``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o_graph.optim.blocks import KINDS

# Decays of the fast and the slow momentum.
FAST, SLOW = 0.9, 0.99
# Decays of the averages of a cosine; the first hardly averages.
COSINE_DECAYS = (0.5, 0.9, 0.99)

# In the order of ``observe``: cosines, ratios, of the network, length and weights, age, kind.
NUM_SIGNALS = 6 + 5 + 3 + 3 + 1 + len(KINDS)

# Updates of a row below this fraction of its matrix's typical one count as rounding errors.
LEAST_UPDATE = 1e-6
# Far below any square that matters: only prevents NaN from 0 / 0.
TINY = 1e-37
# Logarithms are clipped at this.
MOST = 3.0
# Units of the signals, chosen so that equal weights on any two signals have about the same effect
# on how a run ends. Evolution strategies perturb all weights equally, and do not notice a weight
# that has almost no effect. Cosines are small, and smaller the longer they are averaged.
COSINE_UNITS = (6.0, 10.0, 14.0)
OF_WEIGHT_UNIT, LOG_LENGTH_UNIT, GROWTH_UNIT = 1 / 8, 1 / 4, 1 / 2
AGE_UNIT, KIND_UNIT = 1 / 2, 1 / 2
# The signal of the step number stops here: runs of meta-training are not much longer.
OLDEST = 4000.0
# Steps fade if the last ten gradients are small compared to those of this last part of the run.
LONG_PART = 0.25
# Units of lengths grow with weights up to this many times the first unit.
MOST_GROWTH = 20.0
# Kernels that start below this fraction of the median kernel, each relative to torch's own
# initialisation, count as small: the smaller, the more as if they started at 0.
SMALL = 1 / 4


# Sums over the scalars of each row, (6, N, R), or of each matrix, (6, N, T): squares of the fast
# momentum, the slow momentum, the last update, the weights and the gradient; gradient times last
# update.
FAST_SUM, SLOW_SUM, UPDATE_SUM, WEIGHT_SUM, GRADIENT_SUM, AGAINST_SUM = range(6)
OF_GRADIENT = slice(GRADIENT_SUM, AGAINST_SUM + 1)


def cosine(against: Tensor, gradient: Tensor, last: Tensor) -> Tensor:
    """Compute the cosine between the gradient and the direction that the last step went down.

    Positive: the step could have been longer. Negative: it was too long. 0 before the first step,
    and where squares underflow, as for neurons that are almost dead. This is the hypergradient of
    Baydin et al. 2017 without its scale.

    Args:
        against: Sums of products of gradient and last update.
        gradient: Sums of squares of the gradient.
        last: Sums of squares of the last update.
    """
    found = -against / (gradient.sqrt() * last.sqrt() + TINY)
    return torch.where(gradient > TINY, found.clamp(-1, 1), 0.0)


def corrections(ages: Tensor, constants: "Constants") -> Tensor:
    """Compute the bias corrections of the momenta, 1 - decay^(age + 1), (2, T)."""
    return 1 - constants.average_decays ** (ages + 1)


@dataclass(slots=True)
class History:
    """State of the signals from earlier steps.

    Attributes:
        rows: (6, N, R): logarithm of the step length; averages of each row's cosine at three
            decays; squares of the gradient at the last step, and at the first with a gradient.
        tensors: (6, N, T): averages of each matrix's cosine; logarithm of the first unit of
            its lengths; recent and long-term mean of squares of the gradient.
        ages: (T,) number of steps before this one.
    """

    rows: Tensor
    tensors: Tensor
    ages: Tensor


@dataclass(slots=True)
class Constants:
    """Constants of all rows and matrices.

    Attributes:
        tensor_of_row: (R,) index of the matrix that a row belongs to.
        scalars_of_row: (R,) number of scalars of each row.
        rows_of_tensor: (T,) number of rows of each matrix.
        scalars_of_tensor: (T,) number of scalars of each matrix.
        log_torch_rms: (T,) logarithm of the RMS of torch's own initialisation, 1 / sqrt(3 fan-in).
        is_matrix: (T,) whether the block is a kernel.
        kinds: (R, 6) indicators of the kind of each row's block.
        kind_signals: (6, 1, R) indicators as signals.
        is_relative: (T,) whether the unit of lengths is relative to the weights of the matrix.
        log_relative_unit: (T,) logarithm of the unit of lengths over the RMS of the weights; -inf
            if it is not relative.
        log_absolute_unit: (T,) logarithm of the unit of lengths otherwise.
        decay_units: (2, T) relative unit of matrices with weight decay, 0 for others: with many
            examples and with few.
        is_decaying: (T,) indicator of matrices with weight decay with many examples.
        cosine_weights: (3, 1, 1) weight of a new cosine in its averages.
        cosine_units: (3, 1, 1) factor of each average of cosines.
        average_decays: (2, 1) decays of the fast and slow momentum.
        average_weights: (2, 1, 1, 1) weight of a new gradient in the momenta.
        fading: (2, 2, 1) rates and minimal weights of the two means of squares for fading.
        above: (5,) index of the numerator of each of the ``RATIOS``.
        below: (5,) index of the denominator.
        ratio_units: (5, 1, 1) factors of the logarithms of ratios of squares.
    """

    tensor_of_row: Tensor
    scalars_of_row: Tensor
    rows_of_tensor: Tensor
    scalars_of_tensor: Tensor
    log_torch_rms: Tensor
    is_matrix: Tensor
    kinds: Tensor
    kind_signals: Tensor
    is_relative: Tensor
    log_relative_unit: Tensor
    log_absolute_unit: Tensor
    decay_units: Tensor
    is_decaying: Tensor
    cosine_weights: Tensor
    cosine_units: Tensor
    average_decays: Tensor
    average_weights: Tensor
    fading: Tensor
    above: Tensor
    below: Tensor
    ratio_units: Tensor


LOG_LENGTH, ROW_COSINES, LAST_SQUARE, FIRST_SQUARE = 0, slice(1, 4), 4, 5
TENSOR_COSINES, FIRST_LOG_UNIT, RECENT_SQUARE, LONG_SQUARE = slice(0, 3), 3, 4, 5
NUM_OF_ROW, NUM_OF_TENSOR = 6, 6


def pooled(rows: Tensor, tensor_of_row: Tensor, tensors: int) -> Tensor:
    """Sum over the rows of each matrix: (*, N, R) -> (*, N, T)."""
    answer = rows.new_zeros(*rows.shape[:-1], tensors)
    return answer.index_add_(-1, tensor_of_row, rows)


def log_unit(weight: Tensor, constants: "Constants") -> Tensor:
    """Compute the logarithm of the unit of each matrix's lengths, (N, T).

    The unit is a fraction of the RMS of the weights. For vectors, and if all weights are 0, it is
    an absolute unit for torch's own initialisation, with an RMS of 1 / sqrt(3 fan-in), times the
    factor by which the kernels of this network are larger.

    Args:
        weight: (N, T) sums of squares of the weights.
        constants: Constants of the network.
    """
    rms = (weight / constants.scalars_of_tensor).sqrt()
    log_rms = rms.clamp(min=1e-30).log()
    some = rms > 0
    counts = (some & constants.is_matrix).to(rms)
    of_torch = (log_rms - constants.log_torch_rms) * counts
    network = of_torch.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
    relative = log_rms + constants.log_relative_unit
    known = some & constants.is_relative
    return torch.where(known, relative, network + constants.log_absolute_unit)


def first_log_unit(weight: Tensor, constants: Constants) -> Tensor:
    """Compute the logarithm of the unit of each matrix's lengths at its first step, (N, T).

    A last layer that starts near 0, as for policies and boxes, has to become as large as others,
    and steps in units of its weights would take too long. Its unit is that of a layer that starts
    at 0, times 1 - 3 s, where s is its size relative to the median kernel. At s = 1 / 4 this is s.

    Args:
        weight: (N, T) sums of squares of the weights.
        constants: Constants of the network.
    """
    rms = (weight / constants.scalars_of_tensor).sqrt()
    sizes = torch.where(constants.is_matrix & (rms > 0), rms, math.nan)
    sizes = sizes / constants.log_torch_rms.exp()
    # The larger of two in the middle: a network of two layers may have a small last one.
    median = -(-sizes).nanmedian(-1, keepdim=True).values
    share = sizes / median
    is_small = share < SMALL
    unit = log_unit(weight.masked_fill(is_small, 0), constants)
    return unit + torch.where(is_small, 1 - share * (1 / SMALL - 1), 1.0).log()


def log_growth(weight: Tensor, history: History, constants: Constants) -> Tensor:
    """Compute the logarithm of the growth of each matrix's unit since its first step, (N, T).

    A network with small initial weights has to grow first, and a long step for its first weights
    is a short one for the later ones. Units do not shrink with weights.

    Args:
        weight: (N, T) sums of squares of the weights.
        history: History with the first units.
        constants: Constants of the network.
    """
    grown = log_unit(weight, constants) - history.tensors[FIRST_LOG_UNIT]
    return grown.clamp(0, math.log(MOST_GROWTH))


# Ratios of sums of squares that are signals: numerator, denominator, and unit of the logarithm.
# The squares of the last and the first gradient, from the history, follow the sums.
LAST_GRADIENT, FIRST_GRADIENT = GRADIENT_SUM + 1, GRADIENT_SUM + 2
RATIOS = (
    (FAST_SUM, GRADIENT_SUM, 2.0),
    (SLOW_SUM, GRADIENT_SUM, 2.0),
    (SLOW_SUM, FAST_SUM, 1.0),
    (GRADIENT_SUM, LAST_GRADIENT, 1.0),
    (GRADIENT_SUM, FIRST_GRADIENT, 3.0),
)
GROWTH = 3


def observe(
    sums: Tensor,
    of_matrices: Tensor,
    correction: Tensor,
    history: History,
    constants: Constants,
    growth: Tensor,
) -> Tensor:
    """Compute the signals of each row, (N, R, F), and update the history in place.

    Args:
        sums: (6, N, R) sums over each row, with this step's gradient.
        of_matrices: (6, N, T) sums over each matrix.
        correction: (2, T) bias corrections, see ``corrections``.
        history: History of the steps before.
        constants: Constants of the network.
        growth: (N, T) growth of units, see ``log_growth``.
    """
    of_row, count = constants.tensor_of_row, len(constants.rows_of_tensor)
    _, _, update, _, gradient, against = sums
    _, _, update_of_matrix, _, gradient_of_matrix, against_of_matrix = of_matrices
    # A tiny update of a row, which comes only from whitening with other rows, is rounding error.
    typical = update_of_matrix / constants.rows_of_tensor
    last = update + LEAST_UPDATE**2 * typical[:, of_row]
    new_rows = cosine(against, gradient, last)
    row_averages, tensor_averages = history.rows[ROW_COSINES], history.tensors[TENSOR_COSINES]
    row_averages.lerp_(new_rows.expand_as(row_averages), constants.cosine_weights)
    new_tensors = cosine(against_of_matrix, gradient_of_matrix, update_of_matrix)
    tensor_averages.lerp_(new_tensors.expand_as(tensor_averages), constants.cosine_weights)
    # The first cosine is 0 by definition, so n steps give n - 1 of them.
    made = 1 - (1 - constants.cosine_weights) ** history.ages.clamp(min=1)  # (3, 1, T)
    unit = constants.cosine_units / made
    tensor_cosines = tensor_averages * unit
    row_cosines = row_averages * unit[:, :, of_row]
    before = history.rows[LAST_SQUARE:]
    before = torch.where(before > 0, before, gradient)
    means = sums[:UPDATE_SUM] / correction[:, None, of_row].square()
    known = torch.cat([means, sums[UPDATE_SUM:AGAINST_SUM], before])
    logs = (known + TINY).log()
    ratios = logs[constants.above] - logs[constants.below]
    ratios = (ratios * constants.ratio_units).clamp(-MOST, MOST)
    of_gradient = pooled(ratios[GROWTH], of_row, count) / constants.rows_of_tensor
    of_network = torch.cat([tensor_cosines[1:], of_gradient[None]]).mean(-1, keepdim=True)
    log_length = history.rows[LOG_LENGTH]
    log_weight = 0.5 * (logs[WEIGHT_SUM] - constants.scalars_of_row.log())
    log_units = history.tensors[FIRST_LOG_UNIT] + growth
    of_weight = log_length + log_units[:, of_row] - log_weight
    age = AGE_UNIT * (((history.ages + 1).clamp(max=OLDEST) / 100).log() / 3)[of_row]
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
            constants.kind_signals.expand(-1, len(log_length), -1),
        ]
    )
    history.rows[LAST_SQUARE] = gradient
    history.rows[FIRST_SQUARE] = before[1]
    return signals.movedim(0, -1)


def remaining(horizon: Tensor, ages: Tensor) -> Tensor:
    """Compute the remaining fraction of the run, this step included: (N, 1), above 0."""
    length = horizon[:, None].clamp(min=1)
    return torch.maximum(1 - ages.amax() / length, 1 / length)
