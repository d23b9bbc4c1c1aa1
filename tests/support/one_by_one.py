"""Predictors of accuracy in the layout of the optimizer: NeuralGraphs, a kernel at a time.

Weights are those of a ``GeneralizationPredictor``, rounds of messages those of ``NGGNN`` and
``NGT``; kernels are padded, placed and embedded once more, kernel by kernel and set by set. A slow
twin for values and gradients, and what the throughput of mixed batches is measured against.

    python tests/support/one_by_one.py --model ng_gnn --threads 2 --batch 16

The ordered pass has no such layout; its throughput is compared with NG-GNN's, one graph at a time.
"""

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

from l2o_graph.cnn import (
    CNNArchitecture,
    CNNs,
    GeneralizationPredictor,
    chosen,
    cnn_config,
    cnn_module,
)
from l2o_graph.datasets.cnn.park import draw_architecture
from l2o_graph.graph.neural import NeuralGraph
from l2o_graph.layout.blocks import topology_of
from l2o_graph.layout.grids import grid_route
from l2o_graph.layout.spec import ACTIVATIONS, CONSTANTS
from l2o_graph.metanets.structure import structure_of


def cnns(architectures: Sequence[CNNArchitecture], seed: int = 0, dtype=torch.float32) -> CNNs:
    """A network of each, drawn by torch; some weights exactly 0."""
    distinct = tuple(dict.fromkeys(architectures))
    values = []
    with torch.random.fork_rng(devices=[]):
        for i, architecture in enumerate(architectures):
            torch.manual_seed(seed + i)
            row = torch.cat([p.detach().flatten() for p in cnn_module(architecture).parameters()])
            row[:: 7 + i] = 0
            values.append(row.to(dtype))
    count = torch.arange(len(values))
    which = torch.tensor([distinct.index(a) for a in architectures])
    return CNNs(distinct, which, tuple(values), torch.rand(len(values)), count, count)


def park(count: int) -> list[CNNArchitecture]:
    """Architectures as those of the mixed zoo."""
    generator = torch.Generator().manual_seed(0)
    return [draw_architecture(generator, 3) for _ in range(count)]


def graph_of(networks: CNNs, i: int) -> NeuralGraph:
    return NeuralGraph(structure_of(networks.architecture(i)), networks.values[i][None])


def padded(model: GeneralizationPredictor, graph: NeuralGraph, k) -> Tensor:
    """(edges, most * most) of one kernel."""
    most, spec = model.config.max_kernel, graph.spec
    if spec.is_constant(k.parameter):
        scalars = graph.values.new_full((k.size,), CONSTANTS[k.parameter - len(spec.shapes)])
    else:
        scalars = graph.parameter(k.parameter).flatten()[k.start : k.start + k.size]
        if model.config.scaled:
            rows, columns = k.grid[1:]
            fan_in = (rows if k.from_rows else columns) * math.prod(k.positions)
            scalars = math.sqrt(fan_in) * scalars
    height, width = (1,) * (2 - len(k.positions)) + k.positions
    top, left = (most - height) // 2, (most - width) // 2
    around = (left, most - width - left, top, most - height - top)
    return nn.functional.pad(scalars.view(-1, height, width), around).flatten(1)


def first_edges(model: GeneralizationPredictor, graph: NeuralGraph, k) -> Tensor:
    """(P, edges, C) of one kernel, forward and, where there are any, reverse."""
    embedding = model.body.edges
    x, project = padded(model, graph, k), embedding.kernel
    if not model.config.linear_as_conv and k.kind == "dense":
        x, project = x[:, [x.shape[1] // 2]], embedding.linear
    there, back = (x, torch.zeros_like(x))
    if model.config.reverse:
        there, back = torch.cat([x, back, x], 1), torch.cat([back, x, x], 1)

    def twice(read: Tensor) -> Tensor:
        features = read
        if project.features.frequencies is not None:
            angles = 2 * torch.pi * read @ project.features.frequencies.T
            features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return project.second(project.first(features))

    return torch.stack([twice(there), twice(back)][: 2 if model.config.both_ways else 1])


def first_nodes(model: GeneralizationPredictor, graph: NeuralGraph) -> Tensor:
    embedding, config = model.body.nodes, model.config
    topology = topology_of(graph.spec)
    biases = graph.values.new_zeros(graph.spec.num_nodes)
    for bias in graph.spec.biases:
        start, stop = topology.bias(bias)
        own = graph.parameter(bias.parameter).flatten()[bias.start : bias.start + bias.size]
        biases[start:stop] += own
    states, inputs = embedding.bias(biases[:, None]), 0
    rows = []
    for neurons in graph.spec.neurons:
        if neurons.role == "hidden":
            row = embedding.table[config.inputs + min(neurons.depth, config.depth - 1)]
            if embedding.activation is not None:
                kind = ACTIVATIONS.index(neurons.activation)
                row = row + embedding.activation.weight[kind if kind < 7 else 0]
            rows += [row] * neurons.size
        elif neurons.role == "input":
            rows += list(embedding.table[inputs : inputs + neurons.size])
            inputs += neurons.size
        else:
            rows += list(embedding.table[-neurons.size :])
    return states + torch.stack(rows)


def logits(model: GeneralizationPredictor, graphs: Sequence[NeuralGraph]) -> Tensor:
    """What a predictor answers for networks with all classes, as one ``NeuralGraph``."""
    nodes = torch.cat([first_nodes(model, graph) for graph in graphs])
    graph = NeuralGraph.batch(graphs)
    topology = topology_of(graph.spec)
    edges = [first_edges(model, graph, kernel) for kernel in graph.spec.kernels]
    route = grid_route(topology, nodes.device, both=model.config.both_ways)
    states, _ = model.body.backbone(route, nodes, edges)
    read = torch.tensor([n.role == "output" for n in graph.spec.neurons for _ in range(n.size)])
    return model.body.head.maps(states[read].view(len(graphs), -1)).squeeze(1)


def throughput(
    model: GeneralizationPredictor,
    on_graphs: GeneralizationPredictor,
    count: int,
    batch: int,
    rounds: int,
) -> tuple[float, float, float]:
    """Networks a second, forward and backward, by turns.

    In mixed batches; the same code, one network at a time; and ``NeuralGraph``s one at a time, by
    ``on_graphs``.
    """
    networks = cnns(park(count))
    graphs = [graph_of(networks, i) for i in range(count)]

    def in_batches(size: int) -> None:
        for part in torch.arange(count).split(size):
            model.logits(chosen(networks, part)).sum().backward()

    def one_by_one() -> None:
        for graph in graphs:
            logits(on_graphs, [graph]).sum().backward()

    # Of one thread, the time that it had: other programs may have had the core in between.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ways = (lambda: in_batches(batch), lambda: in_batches(1), one_by_one)
    seconds: list[list[float]] = [[], [], []]
    for turn, (way, times) in itertools.product(
        range(rounds + 1), zip(ways, seconds, strict=True)
    ):  # the first does not count
        model.zero_grad()
        on_graphs.zero_grad()
        begin = clock()
        way()
        if turn:
            times.append(clock() - begin)
    mixed, alone, graph = (count / median(times) for times in seconds)
    return mixed, alone, graph


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="ng_gnn", choices=("ng_gnn", "ng_t", "ordered"))
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    sizes = {} if args.hidden is None else {"hidden": args.hidden}
    model = GeneralizationPredictor(cnn_config(args.model, dropout=0.0, **sizes))
    on_graphs = model
    if args.model == "ordered":
        on_graphs = GeneralizationPredictor(cnn_config("ng_gnn", dropout=0.0))
    mixed, alone, graph = throughput(model, on_graphs, args.count, args.batch, args.rounds)
    print(
        f"mixed batches {mixed:.1f} CNNs/s; one at a time {alone:.1f}, {mixed / alone:.1f} times; "
        f"as a NeuralGraph {graph:.1f}, {mixed / graph:.1f} times"
    )


if __name__ == "__main__":
    main()
