"""Slow twins: the package's maths again, one neuron, edge and scalar at a time.

Nothing is shared with the package but the weights of its networks and tuned step sizes. Features
are worked out with ``math``, messages as vectors of H channels, so that gradients compare too.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2o_graph.rule import DIRECTION_GAIN, HALVED_AFTER, KERNEL_STEP, NEVER, VECTOR_STEP

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


def newton_schulz(matrix: Tensor) -> Tensor:
    """Muon's five iterations on the matrix itself (Jordan et al. 2024)."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def nominal(history: Sequence[Tensor], is_kernel: bool) -> Tensor:
    """Orthogonalised momentum for a kernel, momentum over its RMS for all else."""
    momentum = torch.zeros_like(history[0])
    for gradient in history:
        momentum = 0.9 * momentum + gradient
    follow = history[-1] + 0.9 * momentum
    if not is_kernel:
        return follow / follow.square().mean().sqrt()
    matrix = follow.flatten(1)
    return (newton_schulz(matrix) * max(matrix.shape) ** 0.5).view_as(follow)


def features(
    weight: Tensor, history: Sequence[Tensor], is_kernel: bool, roles: Sequence[float] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """(22, *shape) features of each scalar, and (10,) features of the tensor."""
    raw = []  # for each scalar: weight, gradient, momenta
    for w, *gradients in zip(*[t.flatten().tolist() for t in (weight, *history)], strict=True):
        raw.append([w, gradients[-1], *momenta(gradients)])
    rms = [math.sqrt(sum(x * x for x in row) / len(raw)) for row in zip(*raw, strict=True)]
    follow = nominal(history, is_kernel).flatten().tolist()
    scalars = []
    for values, direction in zip(raw, follow, strict=True):
        pairs = [log_sign(x) for x in values]
        relative = [x / math.hypot(x, s) if x else 0.0 for x, s in zip(values, rms, strict=True)]
        scalars.append([log for log, _ in pairs] + [s for _, s in pairs] + relative + [direction])
    fan_in = weight[0].numel() if is_kernel else 1
    logs = [math.log(s + 1e-20) for s in rms]
    noise = [-math.log(1 - decay**2) / 2 for decay in DECAYS]
    ratios = [
        max(-10, min(10, log - logs[1] - n)) / 4 for log, n in zip(logs[2:], noise, strict=True)
    ]
    size = max(-10, min(10, logs[0])) / 4
    shared = [*ratios, size, math.log(fan_in / 100) / 4, math.log(len(history) / 201) / 4, *roles]
    rows = torch.tensor(scalars, dtype=torch.float64).T
    return rows.reshape(-1, *weight.shape), torch.tensor(shared, dtype=torch.float64)


def offset(position: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Code of a position's distance from the centre of its kernel."""
    distances = [p - (n - 1) / 2 for p, n in zip(position, shape, strict=True)]
    code = []
    for x in [0.0] * (3 - len(shape)) + distances:
        code += [math.sin(x / 4**k) for k in range(3)] + [math.cos(x / 4**k) for k in range(3)]
    return torch.tensor(code, dtype=torch.float64)


def place(node: Node) -> Tensor:
    """Code of which input, output or hidden layer a node is."""
    role = [float(node.role == r) for r in ("input", "hidden", "output")]
    angles = [node.index / 4**k for k in range(6)]
    code = role + [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(code, dtype=torch.float64)


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


def cell_linear(linear, x: Tensor, code: Tensor, shared: Tensor, state: Tensor | None) -> Tensor:
    """One scalar through the linear map of its concatenated inputs."""
    maps = [linear.scalar.weight, linear.offset.weight, linear.tensor.weight]
    inputs = [x, code, shared]
    if state is not None:
        maps.append(linear.cell.weight)
        inputs.append(state)
    return torch.cat(maps, dim=1) @ torch.cat(inputs) + linear.scalar.bias


def update(rule, network: nn.Module, histories: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The nominal preset's update of a chain, from all gradients that each parameter had."""
    silu, centre = nn.functional.silu, offset((), ())
    roles = [[0.0, 0.0] for _ in network.parameters()]
    kernels, network_parameters = set(), list(network.parameters())
    nodes, edges = graph(network, [p[None] for p in network.parameters()])
    for edge in edges:
        if network_parameters[edge.parameter].dim() > 1:
            kernels.add(edge.parameter)
        ends = nodes[edge.source].role == "input", nodes[edge.target].role == "output"
        roles[edge.parameter] = [float(end) for end in ends]
    for node in nodes:
        if node.parameter is not None:
            roles[node.parameter][1] = float(node.role == "output")
    seen = [
        features(p.detach(), history, i in kernels, roles[i])
        for i, (p, history) in enumerate(zip(network.parameters(), histories, strict=True))
    ]
    nodes, edges = graph(network, [x for x, _ in seen])
    lengths = [
        (2 * torch.tanh((rule.length.weight @ shared + rule.length.bias) / 2)).exp().squeeze()
        for _, shared in seen
    ]

    first = []
    for edge in edges:
        inner = []
        for position, x in zip(positions(edge.positions), edge.values.T, strict=True):
            code, shared = offset(position, edge.positions), seen[edge.parameter][1]
            inner.append(silu(cell_linear(rule.reader.embedding.kernel, x, code, shared, None)))
        first.append(rule.reader.embedding.edge(torch.stack(inner).mean(0)).chunk(2))
    vectors = []
    for node in nodes:
        vector = rule.reader.embedding.position(place(node))
        if node.values is not None:
            shared = seen[node.parameter][1]
            inner = cell_linear(rule.reader.embedding.bias, node.values, centre, shared, None)
            vector = vector + rule.reader.embedding.node(silu(inner))
        vectors.append(vector)

    forward = [(e.source, e.target) for e in edges]
    pairs = forward + [(target, source) for source, target in forward]
    states = [there for there, _ in first] + [back for _, back in first]
    vectors, states = ng_gnn(rule.reader.backbone, vectors, pairs, states)

    def step(i: int, x: Tensor, code: Tensor, state: Tensor, fan_in: int) -> Tensor:
        ever = x[20] ** 2 / (x[20] ** 2 + NEVER**2)  # the slowest momentum over its RMS
        hidden = silu(cell_linear(rule.head.first, x, code, seen[i][1], state))
        direction, magnitude = rule.head.last(hidden)
        size = KERNEL_STEP / fan_in**0.5 if fan_in else VECTOR_STEP
        size /= 1 + (len(histories[i]) - 1) / HALVED_AFTER
        return (
            -size
            * lengths[i]
            * magnitude.tanh().exp()
            * (x[-1] + DIRECTION_GAIN * direction.tanh())
            * ever
        )

    runs: list[list[Tensor]] = [[] for _ in seen]
    for n, edge in enumerate(edges):
        state = rule.reader.of_edge.map(torch.cat([states[n], states[n + len(edges)]]))
        i = edge.parameter
        fan_in = seen[i][0][0, 0].numel() if i in kernels else 0
        for position, x in zip(positions(edge.positions), edge.values.T, strict=True):
            runs[i].append(step(i, x, offset(position, edge.positions), state, fan_in))
    for node, vector in zip(nodes, vectors, strict=True):
        if node.values is not None:
            i = node.parameter
            runs[i].append(step(i, node.values, centre, rule.reader.of_node(vector), 0))
    nothing = centre.new_zeros(rule.config.hidden)
    for i, run in enumerate(runs):
        if not run:  # loose
            run += [step(i, x, centre, nothing, 0) for x in seen[i][0].flatten(1).T]
    return [torch.stack(run).view_as(x[0]) for run, (x, _) in zip(runs, seen, strict=True)]


def positions(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*[range(n) for n in shape]))
