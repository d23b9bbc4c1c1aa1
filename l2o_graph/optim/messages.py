"""Messages between neurons along the kernels, without a state for edges.

A kernel's squared weights, summed over positions, measure how much one neuron contributes to
another. Normalised over rows they weight messages along the computation, normalised over columns
messages against it: two products with a matrix that exists anyway. With attention, queries and
keys change these weights, as in NG-T.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from l2o_graph.optim.controller import Reader, Weights, said
from l2o_graph.optim.memory import Memory, Stack
from l2o_graph.optim.signals import TINY, pooled


def heard(
    reader: Reader,
    weights: Weights,
    memory: Memory,
    squares: Mapping[int, Tensor],
    signals: Tensor,
) -> Tensor:
    """Compute the messages that each row receives, (N, R, 2C).

    Args:
        reader: Way of exchanging information, see ``ControllerConfig``.
        weights: Weights of N controllers.
        memory: Memory of the network.
        squares: Squared weights of each stack of kernels here, (N, M, r, c).
        signals: Signals of each row, (N, R, F).
    """
    words = said(weights, signals)
    if reader == "sequence":
        return _of_tensors_before(weights, memory, words)
    return _of_neighbours(reader, weights, memory, squares, signals, words)


def _of_tensors_before(weights: Weights, memory: Memory, words: Tensor) -> Tensor:
    """Run an LSTM over the mean messages of all matrices; return its state at each row's own."""
    constants = memory.constants
    count = len(constants.rows_of_tensor)
    means = pooled(words.mT, constants.tensor_of_row, count) / constants.rows_of_tensor
    given = torch.baddbmm(weights["cell.bias"][:, None], means.mT, weights["cell.input"].mT)
    hidden = words.new_zeros(len(words), weights["cell.state"].shape[-1])
    cell, states = hidden, []
    for x in given.unbind(1):
        gates = x + torch.bmm(weights["cell.state"], hidden[..., None])[..., 0]
        read, forget, new, show = gates.chunk(4, -1)
        cell = forget.sigmoid() * cell + read.sigmoid() * new.tanh()
        hidden = show.sigmoid() * cell.tanh()
        states.append(hidden)
    return torch.stack(states, 1)[:, constants.tensor_of_row]


def _of_neighbours(
    reader: Reader,
    weights: Weights,
    memory: Memory,
    squares: Mapping[int, Tensor],
    signals: Tensor,
    words: Tensor,
) -> Tensor:
    """Average the messages of the neurons that a row reads, and of those that read it."""
    nodes = memory.nodes
    assert nodes is not None
    sets, _, channels = words.shape
    at_node = words.new_zeros(sets, nodes.count + 1, channels)
    at_node = at_node.index_add(1, nodes.of_row, words) / nodes.rows_of[:, None]
    at_node[:, nodes.count] = 0  # rows outside the graph send nothing
    back = torch.zeros_like(at_node)
    with_ones = nn.functional.pad(at_node, (0, 1), value=1.0)
    with_ones_of_rows = nn.functional.pad(words, (0, 1), value=1.0)
    along: list[Tensor] = []
    for s, stack in enumerate(memory.stacks):
        if not stack.is_matrix:
            along.append(words.new_zeros(sets, stack.rows[1] - stack.rows[0], channels))
            continue
        sources, rows = nodes.of_source[s], slice(*stack.rows)
        m, r, _ = stack.shape
        edge = squares[s]
        if sources.shape[1] < edge.shape[-1]:  # a kernel with positions
            edge = edge.unflatten(-1, (sources.shape[1], -1)).sum(-1)  # (N, M, r, i)
        forward, reverse = edge, edge
        if reader == "mean":
            forward = reverse = torch.ones_like(edge)
        if reader == "attention":
            forward, reverse = _attended(weights, memory, stack, s, edge, signals)
        # An additional column of ones gives the sum of the weights, to divide by.
        along.append(_shared(forward @ with_ones[:, sources]).flatten(1, 2))
        told = _shared(reverse.mT @ with_ones_of_rows[:, rows].unflatten(1, (m, r)))
        back = back.index_add(1, sources.flatten(), told.flatten(1, 2))
    back = memory.of_all_ranks(back) / nodes.readers[:, None]
    back[:, nodes.count] = 0
    of_rows = memory.of_all_ranks(memory.laid(along, "rows", (sets, -1, channels)))
    return torch.cat([of_rows, back[:, nodes.of_row]], -1)


def _shared(sums: Tensor) -> Tensor:
    """Divide weighted sums by the sum of the weights, in the last column."""
    return sums[..., :-1] / (sums[..., -1:] + TINY)


def _attended(
    weights: Weights, memory: Memory, stack: Stack, s: int, edge: Tensor, signals: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute attention weights of edges: e^(q k) times a power of the squared weight."""
    nodes = memory.nodes
    assert nodes is not None
    m, r, _ = stack.shape
    at_node = signals.new_zeros(signals.shape[0], nodes.count + 1, signals.shape[-1])
    at_node = at_node.index_add(1, nodes.of_row, signals) / nodes.rows_of[:, None]
    source = at_node[:, nodes.of_source[s]]
    target = signals[:, slice(*stack.rows)].unflatten(1, (m, r))
    found = []
    relative = (edge / (edge.mean((-2, -1), keepdim=True) + TINY) + 1e-6).log()
    for way, asks, shows in ((0, target, source), (1, source, target)):
        ask = asks @ weights["ask.weight"][:, way].mT[:, None]
        show = shows @ weights["show.weight"][:, way].mT[:, None]
        logits = ask @ show.mT if way == 0 else show @ ask.mT
        strength = 1 + weights["strength"][:, way].view(-1, 1, 1, 1)
        found.append((logits.clamp(-8, 8) + strength * relative).clamp(-20, 20).exp())
    return found[0], found[1]
