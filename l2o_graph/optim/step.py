"""One step of the rule: gradients -> signals -> lengths -> directions -> updates.

The same code serves one network in use and N networks in meta-training, each with its own
controller weights. Nothing in it waits for the device.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from l2o_graph.optim import controller, messages, whitening
from l2o_graph.optim.controller import ControllerConfig, Learned
from l2o_graph.optim.memory import NUM_MOMENTA, Memory, Stack
from l2o_graph.optim.signals import (
    AGAINST_SUM,
    FAST_SUM,
    FIRST_LOG_UNIT,
    FIRST_SQUARE,
    GRADIENT_SUM,
    LOG_LENGTH,
    LONG_SQUARE,
    OF_GRADIENT,
    RECENT_SQUARE,
    TINY,
    WEIGHT_SUM,
    corrections,
    first_log_unit,
    log_growth,
    observe,
    pooled,
    remaining,
)

# Without total_steps, lengths fall as 1 / t and are halved after this many steps, so that a run can
# be stopped at any time.
HALVED_AFTER = 300
# Warm-up: lengths start at a tenth and reach half after this many steps. Training does not always
# recover from a first step that is too long.
GROWN_AFTER = 10
# Below this fraction of their first size, gradients shorten steps in proportion.
VANISHED = 1e-5
# The largest fraction by which weights decay in a step.
MOST_DECAY = 0.1
# Decay relative to the step length if examples are few.
DECAY_ON_FEW = 0.6
# Below this cosine between gradient and weights, the size of the weights does not matter.
LEAST_ALONG = 1e-4

# Returns the powers of all matrices, (N, T); only called in steps that recompute roots.
Powers = Callable[[], Tensor]


def advance(
    learned: Learned,
    memory: Memory,
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    horizon: Tensor | None = None,
    few: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Compute the updates of all blocks for one step; the memory changes in place.

    Args:
        learned: Weights of N controllers.
        memory: Memory of the N networks.
        gradients: Gradients of each stack here, (B, r, c).
        parameters: Parameters of each stack here, (B, r, c).
        horizon: (N,) number of steps of the whole run, 0 if not known; None if not known for any.
        few: () degree ε to which examples are few, from 0 to 1; None if not known. Weight decay
            grows with it, and units of lengths grow less with the weights.

    Returns:
        Update of each stack here, (B, r, c), and the RMS of each matrix's update, (N, T).
    """
    stacks = memory.stacks
    sums, squares = _row_sums(learned.config, memory, gradients, parameters)
    of_matrices = _over_rows(memory, sums)
    if any(stack.age == 0 for stack in memory.all_stacks):
        _begin(learned, memory, of_matrices[WEIGHT_SUM])
    square = of_matrices[GRADIENT_SUM].clone()
    alive = _alive(memory, square)
    growth = log_growth(of_matrices[WEIGHT_SUM], memory.history, memory.constants)
    if few is not None:
        few = few * _sized(memory, gradients, parameters, of_matrices)
        growth = growth * (1 - few)
    units = (memory.history.tensors[FIRST_LOG_UNIT] + growth).exp()
    # Gradients that are only rounding error count as 0 in signals and powers.
    of_matrices[OF_GRADIENT] *= alive
    sums[OF_GRADIENT] *= alive[:, memory.constants.tensor_of_row]
    correction = corrections(memory.history.ages, memory.constants)
    change = _changes(learned, memory, sums, of_matrices, correction, squares, growth)
    lengths = _lengths(memory, change, units, horizon)
    # From here on stack.last holds this step's update; one direction at a time saves memory.
    directions = _directions(learned, memory, gradients, of_matrices, correction)
    for stack, direction in zip(stacks, directions, strict=True):
        if direction is not stack.last:
            stack.last.copy_(direction)
    norms = memory.laid(
        [torch.linalg.vector_norm(s.last, dim=(-2, -1)).view(s.sets, -1) for s in stacks],
        "tensors",
        (len(memory.history.tensors[0]), -1),
    )
    going = alive * _fading(memory, square)
    # Directions are scaled to an RMS of 1 over each matrix; lengths are those of rows; descent.
    unit = -going * memory.constants.scalars_of_tensor.sqrt() / (norms + whitening.VANISHING)
    factors = lengths * unit[:, memory.constants.tensor_of_row]
    decays = _decays(learned, memory, lengths, units, going, few)
    for stack, p in zip(stacks, parameters, strict=True):
        rows = slice(*stack.rows)
        stack.last.mul_(factors[:, rows].reshape(-1, stack.shape[1], 1))
        if stack.decays(few is not None):
            stack.last.addcmul_(p, decays[:, rows].reshape(-1, stack.shape[1], 1), value=-1)
    for stack in memory.all_stacks:
        stack.age += 1
    memory.history.ages += 1
    return [stack.last for stack in stacks], _mean_of_rows(memory, lengths.square()).sqrt()


def _changes(
    learned: Learned,
    memory: Memory,
    sums: Tensor,
    of_matrices: Tensor,
    correction: Tensor,
    squares: dict[int, Tensor],
    growth: Tensor,
) -> Tensor:
    """Compute the change of the logarithm of each row's length, (N, R)."""
    config, constants, of_row = learned.config, memory.constants, memory.constants.tensor_of_row
    if config.grain == "tensor":  # every row as the mean over the rows of its matrix
        sums = (of_matrices / constants.rows_of_tensor)[..., of_row]
    signals = observe(sums, of_matrices, correction, memory.history, constants, growth)
    heard = None
    if config.reader != "none":
        heard = messages.heard(config.reader, learned.weights, memory, squares, signals)
    change = controller.change(learned.weights, signals, heard)
    return _mean_of_rows(memory, change)[:, of_row] if config.grain == "tensor" else change


def _lengths(memory: Memory, change: Tensor, units: Tensor, horizon: Tensor | None) -> Tensor:
    """Update the stored logarithms of lengths, and compute each row's step length, (N, R)."""
    history = memory.history
    history.rows[LOG_LENGTH] = controller.next_log_length(history.rows[LOG_LENGTH], change)
    of_tensor = units * _schedule(history.ages, horizon)
    return history.rows[LOG_LENGTH].exp() * of_tensor[:, memory.constants.tensor_of_row]


def _decays(
    learned: Learned,
    memory: Memory,
    lengths: Tensor,
    units: Tensor,
    going: Tensor,
    few: Tensor | None,
) -> Tensor:
    """Compute the fraction by which the weights of each row decay, (N, R).

    It is the decay c times the step's length relative to the RMS of the weights.
    """
    constants = memory.constants
    decay = learned.decay
    if few is not None:
        decay = decay * constants.is_decaying
        decay = (decay + few * (DECAY_ON_FEW - decay))[:, constants.tensor_of_row]
    per_length = going * constants.decay_units[int(few is not None)] / units
    part = decay * lengths * per_length[:, constants.tensor_of_row]
    return part.clamp(max=MOST_DECAY)


def _steadiness(of_matrices: Tensor, correction: Tensor) -> Tensor:
    """Compute how steady each matrix's gradient is, (N, T), from 0 to 1."""
    fast, gradient = of_matrices[FAST_SUM], of_matrices[GRADIENT_SUM]
    return (fast / correction[0].square() / (gradient + TINY)).clamp(max=1)


def _directions(
    learned: Learned,
    memory: Memory,
    gradients: Sequence[Tensor],
    of_matrices: Tensor,
    correction: Tensor,
) -> Iterator[Tensor]:
    """Yield the direction of each stack, (B, r, c), of any scale.

    Args:
        learned: Weights of N controllers.
        memory: Memory of the networks, with momenta that include this step.
        gradients: Gradients of each stack.
        of_matrices: (6, N, T) sums over each matrix.
        correction: (2, T) bias corrections, see ``signals.corrections``.
    """
    of_sources = nn.functional.pad(correction, (0, 0, 1, 0), value=1.0)  # 1 for the gradient
    shares = learned.shares[:, None] / of_sources.T  # (N, T, 3)

    @functools.cache
    def powers() -> Tensor:
        # For a constant gradient, half the power already makes its singular values equal.
        return learned.power * (1 - _steadiness(of_matrices, correction) / 2)

    for stack, g in zip(memory.stacks, gradients, strict=True):
        yield _direction(stack, g, shares[:, slice(*stack.tensors)], powers)


def _schedule(ages: Tensor, horizon: Tensor | None) -> Tensor:
    """Compute the schedule's factor of lengths, (N, T).

    After a warm-up it falls linearly to the end of the run if that is known, else as 1 / t.
    """
    falling = 1 / (1 + ages / HALVED_AFTER)
    if horizon is not None:
        falling = torch.where(horizon[:, None] > 0, remaining(horizon, ages), falling)
    return (ages + 1) / (ages + GROWN_AFTER) * falling


def _alive(memory: Memory, square: Tensor) -> Tensor:
    """Return 1 for a matrix whose gradient is more than rounding error, else 0, (N, T).

    The gradient of a bias in front of a batch norm, or of attention's keys, is 0 but for rounding.

    Args:
        memory: Memory of the networks.
        square: (N, T) sums of squares of the gradient.
    """
    history, constants = memory.history, memory.constants
    effect = (square / constants.scalars_of_tensor).sqrt() * history.tensors[FIRST_LOG_UNIT].exp()
    least = effect.amax(-1, keepdim=True) * (torch.finfo(effect.dtype).eps / 4)
    return (effect > least).to(effect)


def _sized(
    memory: Memory,
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    of_matrices: Tensor,
) -> Tensor:
    """Return 1 for a matrix whose size matters to the loss, else 0, (N, T).

    It does not matter if a norm follows: the gradient is then orthogonal to the weights, and decay
    would only make steps longer relative to them. Last updates are overwritten.
    """
    sets = len(memory.history.tensors[0])
    found = [
        torch.mul(g, p, out=stack.last).sum(-1).view(1, sets, -1)
        for stack, g, p in zip(memory.stacks, gradients, parameters, strict=True)
    ]
    along = memory.of_all_ranks(memory.laid(found, "rows", (1, sets, -1))[0])
    along = _over_rows(memory, along)
    gradient, weight = of_matrices[GRADIENT_SUM], of_matrices[WEIGHT_SUM]
    return (along.square() > LEAST_ALONG**2 * gradient * weight).to(along)


def _fading(memory: Memory, square: Tensor) -> Tensor:
    """Compute the factor φ of the steps of matrices whose gradient vanishes, (N, T), up to 1.

    Directions have no scale, so that steps would continue at full length after all examples are
    fitted. φ is the RMS of the last 10 gradients or so over that of the last quarter of the run;
    far below the first gradient it falls to 0.

    Args:
        memory: Memory of the networks; its means of squares are updated, and its squares of first
            gradients have to be set.
        square: (N, T) sums of squares of the gradient.
    """
    history = memory.history
    means = history.tensors[RECENT_SQUARE : LONG_SQUARE + 1]
    parts, least = memory.constants.fading
    weights = torch.maximum(1 / (1 + parts * history.ages), least)  # (2, T)
    means.lerp_(square.expand_as(means), weights[:, None])
    recent, long = means
    first = _mean_of_rows(memory, history.rows[FIRST_SQUARE])
    of_first = square / memory.constants.rows_of_tensor / (first + TINY)
    of_long = (recent / (long + TINY)).clamp(max=1)
    return of_long.sqrt() * (of_first.sqrt() / VANISHED).clamp(max=1)


def _row_sums(
    config: ControllerConfig,
    memory: Memory,
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> tuple[Tensor, dict[int, Tensor]]:
    """Compute sums over each row, (6, N, R), and squared weights of kernels if messages use them.

    Momenta are updated first; last updates are overwritten.
    """
    against: list[Tensor] = []
    norms: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    squares: dict[int, Tensor] = {}
    norm = torch.linalg.vector_norm
    sets = len(memory.history.tensors[0])
    for i, (stack, g, p) in enumerate(zip(memory.stacks, gradients, parameters, strict=True)):
        stack.averages.lerp_(g, memory.constants.average_weights)
        norms[0].append(norm(stack.momenta, dim=-1).view(-1, sets, stack.rows[1] - stack.rows[0]))
        # The last update is not needed any more: on large networks, new memory for a product costs
        # as much as computing it.
        against.append(stack.last.mul_(g).sum(-1).view(1, sets, -1))
        norms[1].append(norm(p, dim=-1).view(1, sets, -1))
        norms[2].append(norm(g, dim=-1).view(1, sets, -1))
        if config.reader != "none" and stack.is_matrix:
            squares[i] = p.square().unflatten(0, (sets, -1))
    counts = (NUM_MOMENTA, 1, 1)
    found = [memory.laid(x, "rows", (n, sets, -1)) for x, n in zip(norms, counts, strict=True)]
    sums = torch.cat([*found, memory.laid(against, "rows", (1, sets, -1))])
    sums[:AGAINST_SUM].square_()
    return memory.of_all_ranks(sums), squares


def _over_rows(memory: Memory, x: Tensor) -> Tensor:
    """Sum over the rows of each matrix: (*, N, R) -> (*, N, T)."""
    return pooled(x, memory.constants.tensor_of_row, len(memory.history.ages))


def _mean_of_rows(memory: Memory, x: Tensor) -> Tensor:
    """Mean over the rows of each matrix: (*, N, R) -> (*, N, T)."""
    return _over_rows(memory, x) / memory.constants.rows_of_tensor


def _begin(learned: Learned, memory: Memory, weight: Tensor) -> None:
    """Initialise lengths and their units for blocks that make their first step.

    Args:
        learned: Weights of N controllers.
        memory: Memory of the networks.
        weight: (N, T) sums of squares of each matrix's weights.
    """
    history, constants = memory.history, memory.constants
    first = controller.first_log_length(learned.weights, constants.kinds)
    is_new = history.ages == 0
    history.rows[LOG_LENGTH] = torch.where(
        is_new[constants.tensor_of_row], first, history.rows[LOG_LENGTH]
    )
    unit = first_log_unit(weight, constants)
    history.tensors[FIRST_LOG_UNIT] = torch.where(is_new, unit, history.tensors[FIRST_LOG_UNIT])


def _direction(stack: Stack, gradient: Tensor, shares: Tensor, powers: Powers) -> Tensor:
    """Compute the direction of a stack, of any scale, and update its averages of squares.

    Args:
        stack: Stack, with momenta that include this step.
        gradient: Gradient, (B, r, c).
        shares: (N, M, 3) shares of the gradient, its fast and its slow average.
        powers: Powers of whitening.
    """
    of_gradient, of_fast, of_slow = shares.reshape(-1, 3, 1, 1).unbind(1)
    # Written to the memory of the update: on large networks new memory costs as much as a product.
    mixture = torch.mul(gradient, of_gradient, out=stack.last)
    mixture.addcmul_(stack.fast, of_fast).addcmul_(stack.slow, of_slow)
    if stack.square is not None:
        stack.square.lerp_(gradient.square(), whitening.weight_of(stack.age))
        return whitening.relative(mixture, stack.square, stack.mean)
    (left, right), (left_root, right_root) = stack.sides, stack.roots
    if left is not None and left_root is not None:
        _renew(stack, gradient, powers, left, False)
        mixture = whitening.whitened_left(mixture, left_root, left)
    if right is not None and right_root is not None:
        _renew(stack, gradient, powers, right, True)
        # A product cannot be written to its own operand.
        free = stack.last if left is not None else None
        mixture = whitening.whitened_right(mixture, right_root, right, free)
    return mixture


def _renew(
    stack: Stack, gradient: Tensor, powers: Powers, side: whitening.Side, right: bool
) -> None:
    """Update the Gram matrices of a side, and recompute the powers that are due."""
    average, roots = stack.grams[right], stack.roots[right]
    assert average is not None and roots is not None
    age, first = stack.age, stack.first
    every = whitening.LONG_GRAM_PERIOD if side.length >= whitening.LONG_SIDE else 1
    if age < every:
        whitening.take_in(average, gradient, side, right, whitening.weight_of(age))
    elif (age + first) % every == 0:
        whitening.take_in(average, gradient, side, right, whitening.weight_of(age, every))
    if age == 0:
        roots.copy_(torch.eye(side.length, dtype=roots.dtype, device=roots.device))
    count = stack.shape[0] * side.blocks
    due = whitening.due(side.length, age, count, first + stack.before * side.blocks)
    if not due:
        return
    at = slice(due.start, due.stop, due.step)
    sets = (stack.sets, count, side.length, side.length)
    chosen = average.view(sets)[:, at].flatten(0, 1)
    of_blocks = powers()[:, slice(*stack.tensors)].repeat_interleave(side.blocks, 1)
    renewed = whitening.root(chosen, of_blocks[:, at].flatten())
    roots.view(sets)[:, at] = renewed.unflatten(0, (stack.sets, -1))
