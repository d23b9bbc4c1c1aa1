"""NetSpec -> Topology, NeuralGraph, and the exchange with torch-geometric.

Nodes are neurons and edges are pairs of neurons joined by a kernel. Nothing is n x n: the edges
of a kernel [out, in, *positions] are the cells of its own (out, in) grid, in the order in which
torch stores it, so what flows into a neuron is a row of the grid and what flows back a column.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.architecture import (
    Bias,
    Kernel,
    NetSpec,
    Neurons,
    Role,
    spec_of_module,
    spec_of_parameters,
)

if TYPE_CHECKING:  # a slow import, and only the exchange needs it
    import torch_geometric.data

ROLES: tuple[Role, ...] = ("input", "hidden", "output")

# Wavelengths of a position, 2 pi 4^k: neighbours differ in the first, thousands in the last.
NODE_FREQUENCIES = tuple(4.0**-k for k in range(6))
OFFSET_FREQUENCIES = tuple(4.0**-k for k in range(3))
NODE_POSITION_SIZE = len(ROLES) + 2 * len(NODE_FREQUENCIES)
OFFSET_SIZE = 3 * 2 * len(OFFSET_FREQUENCIES)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of a kernel's grid, all columns: the least that is worked on at once."""

    kernel: int
    start: int
    stop: int


@dataclass(frozen=True)
class Topology:
    """What stays the same from step to step: where everything lies. Built once for a NetSpec.

    Attributes:
        spec: The network.
        parameter_start: Where each parameter begins among all P scalars.
        node_start: Where each set of neurons begins among all N nodes.
        degree: (N,) edges that reach each node, in both directions.
    """

    spec: NetSpec
    parameter_start: tuple[int, ...]
    node_start: tuple[int, ...]
    degree: Float[Tensor, " N"]

    def grid(self, kernel: Kernel) -> tuple[int, int, int]:
        """(out, in, positions) of a kernel."""
        out, source = self.spec.neurons[kernel.target].size, self.spec.neurons[kernel.source].size
        return out, source, math.prod(kernel.positions)

    def nodes(self, neurons: int) -> slice:
        """Where a set of neurons lies among the N nodes."""
        start = self.node_start[neurons]
        return slice(start, start + self.spec.neurons[neurons].size)

    def chunks(self, most: int) -> tuple[tuple[Piece, ...], ...]:
        """Divide the rows of all kernels into chunks of at most so many parameters.

        One row is the least a chunk holds. A network within the limit is a single chunk.
        """
        chunks: list[list[Piece]] = [[]]
        room = most
        for k, kernel in enumerate(self.spec.kernels):
            out, source, positions = self.grid(kernel)
            row = 0
            while row < out:
                rows = min(out - row, room // (source * positions))
                if rows <= 0 and chunks[-1]:  # below 0 after a row that alone exceeds the limit
                    chunks.append([])
                    room = most
                    continue
                rows = max(rows, 1)
                chunks[-1].append(Piece(k, row, row + rows))
                room -= rows * source * positions
                row += rows
        return tuple(tuple(chunk) for chunk in chunks if chunk)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def topology_of(spec: NetSpec) -> Topology:
    """The topology of a network; the second call for an equal network costs nothing."""
    node_start, at = [], 0
    for neurons in spec.neurons:
        node_start.append(at)
        at += neurons.size
    degree = torch.zeros(at)
    for kernel in spec.kernels:
        for one, other in ((kernel.source, kernel.target), (kernel.target, kernel.source)):
            start = node_start[one]
            degree[start : start + spec.neurons[one].size] += spec.neurons[other].size
    parameter_start, at = [], 0
    for shape in spec.shapes:
        parameter_start.append(at)
        at += math.prod(shape)
    return Topology(spec, tuple(parameter_start), tuple(node_start), degree)


def sinusoids(x: Float[Tensor, "*n"], frequencies: tuple[float, ...]) -> Float[Tensor, "*n f"]:
    """Sine and cosine of x at each frequency: a bounded code for an unbounded number."""
    angles = x[..., None] * torch.tensor(frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def node_positions(spec: NetSpec) -> Float[Tensor, "N D"]:
    """Which input, which output or which hidden layer each node is.

    The paper (section 3.1) keeps a learned row for each of them; as a function of the index the
    code has no end, so that a network may have any number of inputs, outputs and layers.
    """
    rows = [torch.zeros(0, NODE_POSITION_SIZE)]
    for neurons in spec.neurons:
        role = torch.zeros(neurons.size, len(ROLES))
        role[:, ROLES.index(neurons.role)] = 1
        hidden = neurons.role == "hidden"
        index = torch.full((neurons.size,), neurons.depth) if hidden else torch.arange(neurons.size)
        rows.append(torch.cat([role, sinusoids(index.float(), NODE_FREQUENCIES)], dim=1))
    return torch.cat(rows)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def kernel_offsets(positions: tuple[int, ...]) -> Float[Tensor, "K D"]:
    """The offset of each position of a kernel from its centre, along up to three axes."""
    axes = [torch.arange(n) - (n - 1) / 2 for n in positions]
    axes = [torch.zeros(1)] * (3 - len(axes)) + axes
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    return sinusoids(grid, OFFSET_FREQUENCIES).reshape(len(grid), OFFSET_SIZE)


@dataclass(frozen=True, slots=True)
class NeuralGraph:
    """A network as a graph: F features for each of its P parameters, laid out as torch lays them.

    Attributes:
        spec: The network's neurons and which parameter joins which.
        values: (F, P), parameters in the order of ``spec``, each contiguous. A kernel's part is
            edge features, a bias's part node features.
    """

    spec: NetSpec
    values: Float[Tensor, "F P"]

    def parameter(self, index: int) -> Tensor:
        """Features of one parameter, (F, *shape), a view of ``values``."""
        shape = self.spec.shapes[index]
        start = topology_of(self.spec).parameter_start[index]
        return self.values[:, start : start + math.prod(shape)].view(-1, *shape)

    def parameters(self) -> list[Tensor]:
        """The first feature of each parameter in its own shape: for a fresh graph, the weights."""
        return [self.parameter(i)[0] for i in range(len(self.spec.shapes))]

    def __str__(self) -> str:
        return f"NeuralGraph of {self.spec}"

    def to_data(self) -> "torch_geometric.data.Data":
        """Export to torch-geometric.

        Returns:
            ``x`` (N, F) bias features, zero for nodes without one; ``edge_index`` (2, 2E)
            forward edges kernel by kernel and then the same reversed; ``edge_attr``
            (2E, F * K) with K the most positions of any kernel, smaller kernels padded at the
            end; ``loose`` (F, L) what lies outside the graph; ``spec``, to come back.
        """
        from torch_geometric.data import Data

        topology = topology_of(self.spec)
        features = len(self.values)
        widest = max((topology.grid(k)[2] for k in self.spec.kernels), default=1)
        x = self.values.new_zeros(self.spec.num_nodes, features)
        for bias in self.spec.biases:
            x[topology.nodes(bias.neurons)] = self.parameter(bias.parameter).T
        index, attributes = [torch.zeros(2, 0, dtype=torch.long)], []
        for kernel in self.spec.kernels:
            out, source, positions = topology.grid(kernel)
            to = torch.arange(out) + topology.node_start[kernel.target]
            of = torch.arange(source) + topology.node_start[kernel.source]
            index.append(torch.stack([of.repeat(out), to.repeat_interleave(source)]))
            cells = self.parameter(kernel.parameter).reshape(features, out * source, positions)
            padded = nn.functional.pad(cells, (0, widest - positions))
            attributes.append(padded.transpose(0, 1).flatten(1))
        forward = torch.cat(index, dim=1).to(x.device)
        edges = torch.cat([x.new_zeros(0, features * widest), *attributes])
        loose = [self.parameter(i).reshape(features, -1) for i in self.spec.loose]
        return Data(
            x=x,
            edge_index=torch.cat([forward, forward.flip(0)], dim=1),
            edge_attr=torch.cat([edges, edges]),
            loose=torch.cat([x.new_zeros(features, 0), *loose], dim=1),
            spec=dataclasses.asdict(self.spec),
            num_nodes=self.spec.num_nodes,
        )

    @staticmethod
    def from_data(data: "torch_geometric.data.Data") -> "NeuralGraph":
        """Import what ``to_data`` exported, bit for bit; reads the forward edges only.

        Raises:
            ValueError: When the data carries no ``spec`` or does not fit it.
        """
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
        features, edge, loose = x.shape[1], 0, 0
        values = x.new_zeros(features, spec.num_parameters)
        graph = NeuralGraph(spec, values)
        for bias in spec.biases:
            graph.parameter(bias.parameter)[:] = x[topology.nodes(bias.neurons)].T
        for kernel in spec.kernels:
            out, source, positions = topology.grid(kernel)
            cells = edges[edge : edge + out * source].reshape(out * source, features, -1)
            shape = spec.shapes[kernel.parameter]
            graph.parameter(kernel.parameter)[:] = (
                cells[:, :, :positions].transpose(0, 1).reshape(features, *shape)
            )
            edge += out * source
        for i in spec.loose:
            size = math.prod(spec.shapes[i])
            part = data.loose[:, loose : loose + size]
            graph.parameter(i)[:] = part.reshape(features, *spec.shapes[i])
            loose += size
        return graph


def _spec_from_dict(record: dict) -> NetSpec:
    return NetSpec(
        names=tuple(record["names"]),
        shapes=tuple(tuple(shape) for shape in record["shapes"]),
        neurons=tuple(Neurons(**n) for n in record["neurons"]),
        kernels=tuple(
            Kernel(**{**k, "positions": tuple(k["positions"])}) for k in record["kernels"]
        ),
        biases=tuple(Bias(**b) for b in record["biases"]),
        loose=tuple(record["loose"]),
    )


def neural_graph(
    network: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> NeuralGraph:
    """A network as a graph, its weights the only feature; print it to see what was understood.

    Args:
        network: A module, or its ``parameters()`` or ``named_parameters()``.

    Returns:
        The graph, one feature for each parameter, detached copies in the widest type found.

    Raises:
        ValueError: When there are no parameters.
    """
    if isinstance(network, nn.Module):
        parameters, spec = list(network.parameters()), None
        if parameters:
            spec = spec_of_module(network)
    else:
        parameters, names = [], []
        for item in network:
            name, parameter = item if isinstance(item, tuple) else (None, item)
            parameters.append(parameter)
            names += [] if name is None else [name]
        spec = spec_of_parameters(parameters, names or None)
    if spec is None:
        raise ValueError("expected a module with parameters, found none")
    return NeuralGraph(spec, torch.cat([p.detach().reshape(-1) for p in parameters])[None])
