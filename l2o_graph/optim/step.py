"""One step of the rule: gradients -> signals -> lengths and mixtures -> directions -> updates.

The same arithmetic serves a network in use and N networks in meta-training, each under its own
weights; nothing in it waits for a device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from l2o_graph.optim import controller, messages, whitening
from l2o_graph.optim.controller import ControllerConfig, Weights
from l2o_graph.optim.memory import Memory, Stack
from l2o_graph.optim.signals import (
    FAST,
    LOG_LENGTH,
    LOG_UNIT,
    SLOW,
    WEIGHT_ROW,
    Sums,
    corrected,
    first_log_unit,
    observe,
    pooled,
    remaining,
)

# Without a word about the end, lengths fall as 1 / t on their own, halved after so many steps:
# whenever a run stops, the steps before were short.
HALVED_AFTER = 200
# Steps until Gram matrices are averages of so many gradients that the whole power is due.
POWER_RAMP = 10


def advance(
    config: ControllerConfig,
    weights: Weights,
    memory: Memory,
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    horizon: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Make one step of all blocks; the memory is of the step after, in place.

    Args:
        config: Of the controller.
        weights: Of N controllers.
        memory: Of the N networks.
        gradients: Of each stack, (B, r, c).
        parameters: Of each stack, likewise.
        horizon: (N,) number of steps of the whole run, 0 for none; None for none of them.

    Returns:
        What is to be added to each stack, (B, r, c), and the RMS of each matrix's update (N, T).
    """
    stacks, history, constants = memory.stacks, memory.history, memory.constants
    of_row, ages = constants.tensor_of_row, history.ages
    for stack, g in zip(stacks, gradients, strict=True):
        stack.averages.lerp_(g, constants.average_weights)
    sums, squares = _row_sums(config, stacks, gradients, parameters)
    if any(stack.age == 0 for stack in stacks):
        _begin(weights, memory, sums)
    if config.grain == "tensor":
        sums = _of_tensors(memory, sums)
    signals = observe(sums, history, constants, horizon)
    heard = None
    if config.reader != "none":
        heard = messages.heard(config.reader, weights, memory, squares, signals)
    answer = controller.answers(weights, signals, heard)
    pooled_answer = _mean_of_rows(memory, answer.mT).mT
    if config.grain == "tensor":
        answer = pooled_answer[:, of_row]
    history.rows[LOG_LENGTH] = controller.next_log_length(history.rows[LOG_LENGTH], answer)
    log_length = history.rows[LOG_LENGTH] + controller.departure(answer)
    of_tensor = history.tensors[LOG_UNIT].exp() / (1 + ages / HALVED_AFTER)
    if horizon is not None:
        of_tensor = of_tensor * torch.where(horizon[:, None] > 0, remaining(horizon, ages), 1.0)
    lengths = log_length.exp() * of_tensor[:, of_row]
    shares = controller.shares(pooled_answer) / torch.stack(
        [torch.ones_like(ages), corrected(ages, FAST), corrected(ages, SLOW)], -1
    )
    # One gradient's own Gram matrices whiten it at half the power that averages of many take.
    powers = controller.power(pooled_answer) * (0.5 + 0.5 * (ages / POWER_RAMP).clamp(max=1))
    directions = [
        _direction(stack, g, shares[:, slice(*stack.tensors)], powers[:, slice(*stack.tensors)])
        for stack, g in zip(stacks, gradients, strict=True)
    ]
    norms = torch.cat(
        [
            torch.linalg.vector_norm(d, dim=(-2, -1)).view(stack.sets, -1)
            for stack, d in zip(stacks, directions, strict=True)
        ],
        1,
    )
    # Of RMS 1 over each matrix, times the length of each row, downwards.
    unit = -constants.scalars_of_tensor.sqrt() / (norms + whitening.VANISHING)
    factors = lengths * unit[:, of_row]
    for stack, d in zip(stacks, directions, strict=True):
        m, r, _ = stack.shape
        factor = factors[:, slice(*stack.rows)].reshape(-1, r, 1)
        stack.last.copy_(d.mul_(factor))
        stack.age += 1
    history.ages += 1
    mean_square = _mean_of_rows(memory, lengths.square())
    return [stack.last for stack in stacks], mean_square.sqrt()


def _row_sums(
    config: ControllerConfig,
    stacks: Sequence[Stack],
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> tuple[Sums, dict[int, Tensor]]:
    """Sums over each row, and squared weights of the kernels where messages need them."""
    against: list[Tensor] = []
    norms: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    squares: dict[int, Tensor] = {}
    norm = torch.linalg.vector_norm
    for i, (stack, g, p) in enumerate(zip(stacks, gradients, parameters, strict=True)):
        sets = stack.sets
        against.append(torch.linalg.vecdot(g, stack.last).view(1, sets, -1))
        norms[0].append(norm(stack.momenta, dim=-1).view(-1, sets, stack.rows[1] - stack.rows[0]))
        norms[1].append(norm(g, dim=-1).view(1, sets, -1))
        norms[2].append(norm(p, dim=-1).view(1, sets, -1))
        if config.reader != "none" and stack.is_matrix:
            squares[i] = p.square().unflatten(0, (sets, -1))
    found = torch.cat([torch.cat(parts, -1) for parts in norms]).square_()
    return Sums(torch.cat(against, -1)[0], found), squares


def _mean_of_rows(memory: Memory, x: Tensor) -> Tensor:
    """Mean over the rows of each matrix: (*, N, R) -> (*, N, T)."""
    constants = memory.constants
    count = len(constants.rows_of_tensor)
    return pooled(x, constants.tensor_of_row, count) / constants.rows_of_tensor


def _begin(weights: Weights, memory: Memory, sums: Sums) -> None:
    """Give blocks that make their first step a length and a unit of lengths."""
    history, constants = memory.history, memory.constants
    first = controller.FIRST_LOG_LENGTH + 2 * weights["first_length"] @ constants.kinds.T
    is_new = history.ages == 0
    history.rows[LOG_LENGTH] = torch.where(
        is_new[constants.tensor_of_row], first, history.rows[LOG_LENGTH]
    )
    weight = pooled(sums.squares[WEIGHT_ROW], constants.tensor_of_row, len(is_new))
    unit = first_log_unit(
        weight, constants.scalars_of_tensor, constants.fan_in, constants.is_matrix
    )
    history.tensors[LOG_UNIT] = torch.where(is_new, unit, history.tensors[LOG_UNIT])


def _of_tensors(memory: Memory, sums: Sums) -> Sums:
    """The same sums for every row of a matrix: their mean over its rows."""
    of_row = memory.constants.tensor_of_row
    return Sums(
        _mean_of_rows(memory, sums.against)[..., of_row],
        _mean_of_rows(memory, sums.squares)[..., of_row],
    )


def _direction(stack: Stack, gradient: Tensor, shares: Tensor, powers: Tensor) -> Tensor:
    """What a stack goes along, of any scale; its averages of squares take in the gradient.

    Args:
        stack: Its averages of gradients are of this step already.
        gradient: (B, r, c).
        shares: (N, M, 3) of the gradient, its fast and its slow average.
        powers: (N, M) that sides are whitened with.
    """
    of_gradient, of_fast, of_slow = shares.reshape(-1, 3, 1, 1).unbind(1)
    mixture = gradient * of_gradient
    mixture.addcmul_(stack.fast, of_fast).addcmul_(stack.slow, of_slow)
    if stack.square is not None:
        stack.square.lerp_(gradient.square(), whitening.weight_of(stack.age))
        return whitening.relative(mixture, stack.square, stack.mean)
    for right in (False, True):
        _renew(stack, gradient, powers, right)
    return whitening.whitened(mixture, *stack.roots)


def _renew(stack: Stack, gradient: Tensor, powers: Tensor, right: bool) -> None:
    """Let the Gram matrices of a side take in the gradient, and renew the powers that are due."""
    average, roots, side = stack.grams[right], stack.roots[right], stack.sides[right]
    if average is None or roots is None:
        return
    age, first = stack.age, stack.tensors[0]
    every = whitening.LONG_GRAM_PERIOD if side >= whitening.LONG_SIDE else 1
    if age < every:
        whitening.take_in(average, gradient, right, whitening.weight_of(age))
    elif (age + first) % every == 0:
        whitening.take_in(average, gradient, right, whitening.weight_of(age, every))
    if age == 0:
        roots.copy_(torch.eye(side, dtype=roots.dtype, device=roots.device))
    due = whitening.due(side, age, stack.shape[0], first)
    if not due:
        return
    if len(due) == stack.shape[0]:
        roots.copy_(whitening.root(average, powers.reshape(-1)))
        return
    at = slice(due.start, due.stop, due.step)
    sets = (stack.sets, -1)
    chosen = average.unflatten(0, sets)[:, at].flatten(0, 1)
    renewed = whitening.root(chosen, powers[:, at].reshape(-1))
    roots.unflatten(0, sets)[:, at] = renewed.unflatten(0, sets)
