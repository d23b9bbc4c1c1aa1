"""Slow twins: the package's maths again, one neuron, edge and scalar at a time.

Nothing is shared with the package but the weights of its networks. Features are worked out with
``math``, messages as vectors of H channels, so that gradients compare too.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)


# Graph ----------------------------------------------------------------------------------------


@dataclass
class Node:
    role: str
    index: int  # which input, which output or which hidden layer
    parameter: int | None = None  # its bias, if it has one
    values: Tensor | None = None  # (F,)


@dataclass
class Edge:
    source: int
    target: int
    parameter: int
    positions: tuple[int, ...]
    values: Tensor  # (F, K)


def graph(network: nn.Module, values: Sequence[Tensor]) -> tuple[list[Node], list[Edge]]:
    """Nodes, and forward edges, from features (F, *shape) of each parameter of a chain."""
    number = {id(p): i for i, p in enumerate(network.parameters())}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm2d)
    layers = [m for m in network.modules() if isinstance(m, kinds)]
    previous = list(range(layers[0].weight.shape[1])) if layers[0].weight.dim() > 1 else []
    nodes = [Node("input", i) for i in previous]
    edges, depth = [], -1
    for layer in layers:
        kernel = number[id(layer.weight)]
        if isinstance(layer, nn.BatchNorm2d):  # a neuron behind each neuron
            current = []
            for c, source in enumerate(previous):
                bias = number[id(layer.bias)]
                node = Node("output", c) if layer is layers[-1] else Node("hidden", depth)
                node.parameter, node.values = bias, values[bias][:, c]
                nodes.append(node)
                current.append(len(nodes) - 1)
                edges.append(Edge(source, current[-1], kernel, (), values[kernel][:, c : c + 1]))
            previous = current
            continue
        depth += 1
        positions = tuple(layer.weight.shape[2:])
        pixels = layer.weight.shape[1] // len(previous)
        if pixels > 1:  # flattened: the columns of a channel lie together
            side = math.isqrt(pixels)
            positions = (side, side) if side**2 == pixels else (pixels,)
        current = []
        for o in range(layer.weight.shape[0]):
            last = layer is layers[-1]
            node = Node("output", o) if last else Node("hidden", depth)
            if layer.bias is not None:
                node.parameter = number[id(layer.bias)]
                node.values = values[node.parameter][:, o]
            nodes.append(node)
            current.append(len(nodes) - 1)
            for i, source in enumerate(previous):
                columns = values[kernel][:, o, i * pixels : (i + 1) * pixels]
                edges.append(Edge(source, current[-1], kernel, positions, columns.flatten(1)))
        previous = current
    return nodes, edges


# Features -------------------------------------------------------------------------------------


def log_sign(x: float) -> tuple[float, float]:
    if abs(x) >= math.exp(-10):
        return math.log(abs(x)) / 10, math.copysign(1.0, x)
    return -1.0, math.exp(10) * x


def momenta(gradients: Sequence[float]) -> list[float]:
    """The five momenta of one scalar after all its gradients, oldest first."""
    answer = []
    for beta in DECAYS:
        m = 0.0
        for g in gradients:
            m = beta * m + g
        answer.append(m)
    return answer


def features(weight: Tensor, history: Sequence[Tensor]) -> Tensor:
    """(14, *shape) features of each scalar: seven logarithms, then seven signs."""
    rows = []
    for w, *gradients in zip(*[t.flatten().tolist() for t in (weight, *history)], strict=True):
        pairs = [log_sign(x) for x in (w, gradients[-1], *momenta(gradients))]
        rows.append([log for log, _ in pairs] + [sign for _, sign in pairs])
    return torch.tensor(rows, dtype=torch.float64).T.reshape(-1, *weight.shape)


# NG-GNN ---------------------------------------------------------------------------------------

Pairs = Sequence[tuple[int, int]]  # (source, target) of each edge, in both directions


def next_nodes(layer, nodes: Sequence[Tensor], pairs: Pairs, states: Sequence[Tensor]):
    received = [[] for _ in nodes]
    for (j, i), state in zip(pairs, states, strict=True):
        scale, shift = layer.film(state).chunk(2)
        received[i].append(scale * layer.message(torch.cat([nodes[i], nodes[j]])) + shift)
    answer = []
    for node, messages in zip(nodes, received, strict=True):
        if not messages:
            nothing = node.new_zeros(8 * len(node))
            answer.append(layer.mix(layer.node(torch.cat([node, nothing]))))
            continue
        m = torch.stack(messages)
        mean = m.sum(0) / len(messages)
        variance = (m * m).sum(0) / len(messages) - mean * mean
        alive = variance > 1e-5
        deviation = torch.where(alive, torch.where(alive, variance, 1.0).sqrt(), 0.0)
        gathered = torch.cat([mean, m.amin(0), m.amax(0), deviation])
        amplified = gathered * math.log(len(messages) + 1) / layer.delta
        answer.append(layer.mix(layer.node(torch.cat([node, gathered, amplified]))))
    return answer


def next_edges(layer, nodes: Sequence[Tensor], pairs: Pairs, states: Sequence[Tensor]):
    silu = nn.functional.silu
    return [
        layer.out(silu(layer.edge(e) + layer.source(nodes[j]) + layer.target(nodes[i])))
        for (j, i), e in zip(pairs, states, strict=True)
    ]


def normalised(norm, nodes: Sequence[Tensor]) -> list[Tensor]:
    entries = torch.cat(list(nodes))
    mean = entries.sum() / len(entries)
    deviation = ((entries - mean).square().sum() / len(entries)).sqrt()
    return [(node - mean) / (deviation + 1e-5) * norm.weight + norm.bias for node in nodes]


def ng_gnn(model, nodes: Sequence[Tensor], pairs: Pairs, states: Sequence[Tensor]):
    for layer, norm in itertools.zip_longest(model.layers, model.norms):
        nodes = next_nodes(layer, nodes, pairs, states)
        if norm is not None:
            nodes = [nn.functional.silu(node) for node in normalised(norm, nodes)]
        if norm is not None or model.last_edges:
            states = next_edges(layer, nodes, pairs, states)
    return nodes, states


# The whole update -----------------------------------------------------------------------------


def centred(x: Tensor, positions: Sequence[int], most: int = 5) -> Tensor:
    """(F, K) features of a kernel, in the centre of most x most positions, all in a row."""
    height, width = (1,) * (2 - len(positions)) + tuple(positions)
    padded = torch.zeros(most, most, len(x), dtype=x.dtype)
    for row in range(height):
        for column in range(width):
            place = (most - height) // 2 + row, (most - width) // 2 + column
            padded[place] = x[:, row * width + column]
    return padded.flatten()


def first_edges(embedding, edges: Sequence[Edge]) -> tuple[list[Tensor], list[Tensor]]:
    """First states of the edges, forward and reverse."""
    forward, reverse = [], []
    for edge in edges:
        x = centred(edge.values, edge.positions)
        nothing = torch.zeros_like(x)
        forward.append(embedding.edge(torch.cat([x, nothing, x])))
        reverse.append(embedding.edge(torch.cat([nothing, x, x])))
    return forward, reverse


def first_nodes(embedding, nodes: Sequence[Node]) -> list[Tensor]:
    """First states of the nodes: a row of the table for each input, hidden set and output."""
    states, row, before = [], -1, None
    for node in nodes:
        layer = node.role, node.index, node.parameter
        row += node.role != "hidden" or layer != before
        before = layer
        values = torch.zeros(14, dtype=torch.float64) if node.values is None else node.values
        states.append(embedding.node(centred(values[:, None], ())) + embedding.position[row])
    return states


def through(maps, x: Tensor) -> Tensor:
    for one in maps:
        x = one(x)
    return x


def answered(rule, x: Tensor, state: Tensor) -> Tensor:
    """The update of one scalar."""
    direction, magnitude = through(rule.head.layers, torch.cat([x, state]))
    return 0.01 * direction * torch.exp(0.01 * magnitude)


def update(rule, network: nn.Module, histories: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The paper's NG-GNN update of a chain, from all gradients that each parameter had."""
    pairs = zip(network.parameters(), histories, strict=True)
    seen = [features(p.detach(), history) for p, history in pairs]
    nodes, edges = graph(network, seen)
    embedding = rule.reader.embedding
    there, back = first_edges(embedding, edges)
    ends = [(edge.source, edge.target) for edge in edges]
    both = ends + [(target, source) for source, target in ends]
    vectors, states = ng_gnn(
        rule.reader.backbone, first_nodes(embedding, nodes), both, [*there, *back]
    )
    runs: list[list[Tensor]] = [[] for _ in seen]
    for edge, state in zip(edges, states, strict=False):  # the forward ones come first
        read = through(rule.reader.of_edge, state)
        runs[edge.parameter] += [answered(rule, x, read) for x in edge.values.T]
    for node, vector in zip(nodes, vectors, strict=True):
        if node.values is not None:
            state = through(rule.reader.of_node, vector)
            runs[node.parameter].append(answered(rule, node.values, state))
    nothing = torch.zeros(rule.config.hidden, dtype=torch.float64)
    for run, x in zip(runs, seen, strict=True):
        if not run:  # loose
            run += [answered(rule, scalar, nothing) for scalar in x.flatten(1).T]
    return [torch.stack(run).view_as(x[0]) for run, x in zip(runs, seen, strict=True)]


def lstm_states(rule, seen: Sequence[Tensor]) -> list[Tensor]:
    """The LSTM's state of each tensor from (F, n) features, gate by gate (Hochreiter 1997)."""
    cell = rule.reader.cell
    hidden = memory = torch.zeros(rule.config.hidden, dtype=torch.float64)
    states = []
    for x in seen:
        mapped = [through(rule.reader.read, column) for column in x.T]
        mean = sum(mapped) / len(mapped)
        gates = cell.weight_ih @ mean + cell.bias_ih + cell.weight_hh @ hidden + cell.bias_hh
        into, forget, fresh, out = gates.chunk(4)
        memory = torch.sigmoid(forget) * memory + torch.sigmoid(into) * torch.tanh(fresh)
        hidden = torch.sigmoid(out) * torch.tanh(memory)
        states.append(hidden)
    return states


def update_without_graph(
    rule, parameters: Sequence[Tensor], histories: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """The LSTM's and FF's update, likewise."""
    seen = [features(p, h).flatten(1) for p, h in zip(parameters, histories, strict=True)]
    if rule.config.model == "ff":
        states = [torch.zeros(0, dtype=torch.float64)] * len(seen)
    else:
        states = lstm_states(rule, seen)
    return [
        torch.stack([answered(rule, scalar, state) for scalar in x.T]).view_as(p)
        for x, state, p in zip(seen, states, parameters, strict=True)
    ]
