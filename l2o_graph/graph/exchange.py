"""Conversion of NeuralGraph to torch-geometric's Data and back."""

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from l2o_graph.graph.neural import NeuralGraph
from l2o_graph.layout.blocks import Topology, topology_of
from l2o_graph.layout.positions import node_activations
from l2o_graph.layout.spec import Bias, Kernel, NetSpec, Neurons

if TYPE_CHECKING:  # a slow import, and only the exchange needs it
    import torch_geometric.data


def to_data(graph: NeuralGraph) -> "torch_geometric.data.Data":
    """Export a graph: see ``NeuralGraph.to_data``."""
    from torch_geometric.data import Data

    topology = topology_of(graph.spec)
    features = len(graph.values)
    widest = max((math.prod(k.positions) for k in graph.spec.kernels), default=1)
    slots = _slots(topology)
    x = graph.values.new_zeros(graph.spec.num_nodes, features, max(slots, default=0) + 1)
    for bias, slot in zip(graph.spec.biases, slots, strict=True):
        x[slice(*topology.bias(bias)), :, slot] = graph.scalars(bias).T
    index, attributes = [torch.zeros(2, 0, dtype=torch.long)], []
    for block, kernel in zip(topology.blocks, graph.spec.kernels, strict=True):
        row, column = (nodes.expand(block.grid).flatten() for nodes in block.nodes)
        index.append(torch.stack([row, column] if kernel.from_rows else [column, row]))
        cells = graph.scalars(kernel).unflatten(1, (-1, math.prod(kernel.positions)))
        padded = nn.functional.pad(cells, (0, widest - cells.shape[2]))
        attributes.append(padded.transpose(0, 1).flatten(1))
    forward = torch.cat(index, dim=1).to(x.device)
    edges = torch.cat([x.new_zeros(0, features * widest), *attributes])
    loose = [graph.parameter(i).reshape(features, -1) for i in graph.spec.loose]
    return Data(
        x=x.flatten(1),
        edge_index=torch.cat([forward, forward.flip(0)], dim=1),
        edge_attr=torch.cat([edges, edges]),
        activation=node_activations(graph.spec).to(x.device),
        loose=torch.cat([x.new_zeros(features, 0), *loose], dim=1),
        spec=dataclasses.asdict(graph.spec),
        num_nodes=graph.spec.num_nodes,
    )


def from_data(data: "torch_geometric.data.Data") -> NeuralGraph:
    """Import a graph: see ``NeuralGraph.from_data``."""
    if "spec" not in data:
        raise ValueError("expected a Data made by NeuralGraph.to_data, found one without spec")
    spec = _spec_from_dict(data.spec)
    topology = topology_of(spec)
    x, edges = data.x, data.edge_attr
    found = None if x is None or edges is None else (len(x), len(edges))
    if x is None or edges is None or found != (spec.num_nodes, 2 * spec.num_edges):
        raise ValueError(
            f"expected {spec.num_nodes} nodes and {2 * spec.num_edges} edges, found {found}"
        )
    slots = _slots(topology)
    x = x.unflatten(1, (-1, max(slots, default=0) + 1))
    features, edge, loose = x.shape[1], 0, 0
    graph = NeuralGraph(spec, x.new_zeros(features, spec.num_parameters))
    for bias, slot in zip(spec.biases, slots, strict=True):
        graph.scalars(bias)[:] = x[slice(*topology.bias(bias)), :, slot].T
    for kernel in spec.kernels:
        count = math.prod(kernel.grid)
        cells = edges[edge : edge + count].reshape(count, features, -1)
        edge += count
        if not spec.is_constant(kernel.parameter):
            cells = cells[:, :, : math.prod(kernel.positions)]
            graph.scalars(kernel)[:] = cells.transpose(0, 1).flatten(1)
    for i in spec.loose:
        size = math.prod(spec.shapes[i])
        part = data.loose[:, loose : loose + size]
        graph.parameter(i)[:] = part.reshape(features, *spec.shapes[i])
        loose += size
    return graph


def _slots(topology: Topology) -> list[int]:
    """Count for each bias the earlier ones that share a node with it."""
    ranges, slots = [topology.bias(bias) for bias in topology.spec.biases], []
    for i, (start, stop) in enumerate(ranges):
        slots.append(sum(start < other[1] and other[0] < stop for other in ranges[:i]))
    return slots


def _spec_from_dict(record: dict) -> NetSpec:
    return NetSpec(
        names=tuple(record["names"]),
        shapes=tuple(tuple(shape) for shape in record["shapes"]),
        neurons=tuple(Neurons(**n) for n in record["neurons"]),
        kernels=tuple(
            Kernel(**{**k, "grid": tuple(k["grid"]), "positions": tuple(k["positions"])})
            for k in record["kernels"]
        ),
        biases=tuple(Bias(**b) for b in record["biases"]),
        loose=tuple(record["loose"]),
    )
