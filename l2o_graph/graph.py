"""NetSpec -> Topology, NeuralGraph, and the exchange with torch-geometric.

Nodes are neurons and edges are pairs of neurons joined by a kernel. Nothing is n x n: the edges
of a kernel [out, in, *positions] are the cells of its own (out, in) grid, in the order in which
torch stores it, so what flows into a neuron is a row of the grid and what flows back a column.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from l2o_graph.architecture import (
    ACTIVATIONS,
    CONSTANTS,
    Bias,
    Kernel,
    NetSpec,
    Neurons,
)
from l2o_graph.inference import (
    check_module,
    check_parameter,
    shown,
    spec_of_module,
    spec_of_parameters,
)

if TYPE_CHECKING:  # a slow import, and only the exchange needs it
    import torch_geometric.data

G = TypeVar("G", bound="Gatherable")

# From so many chunks on, what stays of each is kept apart from what goes.
MANY_CHUNKS = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a kernel's grid, all columns: the least that is worked on at once.

    Several rows of one group, or all rows of several groups.

    Attributes:
        kernel: Index of the kernel.
        parameter: Index of the parameter.
        start: First scalar of the flattened parameter.
        grid: Groups, rows of each and columns of each, of these rows alone.
        positions: Spatial shape of the kernel.
        rows: First and last but one of the nodes that the rows are.
        columns: The same for the columns.
        from_rows: Whether rows are what is read.
        again: Whether the scalars are updated by another kernel.
        share: Of the rows of its groups, how large a part these are.
    """

    kernel: int
    parameter: int
    start: int
    grid: tuple[int, int, int]
    positions: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int]
    from_rows: bool
    again: bool
    share: float

    @property
    def edges(self) -> int:
        """Edges in all."""
        return math.prod(self.grid)

    @property
    def ends(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Nodes that the edges lead to, and nodes that they leave: one is rows, one columns."""
        return (self.columns, self.rows) if self.from_rows else (self.rows, self.columns)

    @property
    def stop(self) -> int:
        """Behind the last scalar."""
        return self.start + self.edges * math.prod(self.positions)


Chunk = tuple[Piece, ...]


@dataclass(frozen=True, eq=False)  # a topology is itself: hashed by identity
class Topology:
    """What stays the same from step to step: where everything lies. Built once for a NetSpec.

    Attributes:
        spec: The network.
        parameter_start: Where each parameter begins among all P scalars.
        node_start: Where each set of neurons begins among all N nodes.
        degree: (N,) edges of each node, those that lead to it and those that leave it.
        in_degree: (N,) edges that lead to each node.
        networks: First and last but one of the nodes of each network of a batch.
    """

    spec: NetSpec
    parameter_start: tuple[int, ...]
    node_start: tuple[int, ...]
    degree: Float[Tensor, " N"]
    in_degree: Float[Tensor, " N"]
    networks: tuple[tuple[int, int], ...]

    def sides(self, kernel: Kernel) -> tuple[int, int]:
        """The first node of a kernel's rows and of its columns."""
        source = self.node_start[kernel.source] + kernel.source_start
        target = self.node_start[kernel.target] + kernel.target_start
        return (source, target) if kernel.from_rows else (target, source)

    def bias(self, bias: Bias) -> tuple[int, int]:
        """First and last but one of the nodes that a bias sits on."""
        start = self.node_start[bias.neurons] + bias.neurons_start
        return start, start + bias.size

    def chunks(self, most: int) -> tuple[Chunk, ...]:
        """Divide the rows of all kernels into chunks of at most so many parameters.

        One row is the least a chunk holds. A network within the limit is a single chunk.
        """
        chunks: list[list[Piece]] = [[]]
        room = most
        for k, kernel in enumerate(self.spec.kernels):
            groups, rows, _ = kernel.grid
            row, count = 0, groups * rows
            while row < count:
                fit = min(count - row, room // kernel.row)
                if fit <= 0 and chunks[-1]:  # below 0 after a row that alone exceeds the limit
                    chunks.append([])
                    room = most
                    continue
                piece = self._piece(k, row, max(fit, 1))
                chunks[-1].append(piece)
                taken = piece.grid[0] * piece.grid[1]
                room -= taken * kernel.row
                row += taken
        return tuple(tuple(chunk) for chunk in chunks if chunk)

    def _piece(self, k: int, row: int, most: int) -> Piece:
        """At most so many rows, from a row on: whole groups, or rows of a single one."""
        kernel = self.spec.kernels[k]
        _, rows, columns = kernel.grid
        group, within = divmod(row, rows)
        groups = most // rows if within == 0 else 0
        grid = (groups, rows, columns) if groups else (1, min(most, rows - within), columns)
        of_rows, of_columns = self.sides(kernel)
        of_columns += group * columns
        return Piece(
            kernel=k,
            parameter=kernel.parameter,
            start=kernel.start + row * kernel.row,
            grid=grid,
            positions=kernel.positions,
            rows=(of_rows + row, of_rows + row + grid[0] * grid[1]),
            columns=(of_columns, of_columns + grid[0] * columns),
            from_rows=kernel.from_rows,
            again=kernel.again,
            share=grid[1] / rows,
        )


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def topology_of(spec: NetSpec) -> Topology:
    """The topology of a network; the second call for an equal network costs nothing."""
    node_start, at = [], 0
    for neurons in spec.neurons:
        node_start.append(at)
        at += neurons.size
    degree, in_degree = torch.zeros(2, at, device="cpu")  # also for a model on the meta device
    parameter_start, scalars = [], 0
    for shape in spec.shapes:
        parameter_start.append(scalars)
        scalars += math.prod(shape)
    first = [
        i for i, n in enumerate(spec.neurons) if not i or n.network != spec.neurons[i - 1].network
    ]
    networks = tuple(itertools.pairwise([*(node_start[i] for i in first), at]))
    where = tuple(parameter_start), tuple(node_start)
    topology = Topology(spec, *where, degree, in_degree, networks)
    for kernel in spec.kernels:
        groups, rows, columns = kernel.grid
        of_rows, of_columns = topology.sides(kernel)
        rows_reached = slice(of_rows, of_rows + groups * rows)
        columns_reached = slice(of_columns, of_columns + groups * columns)
        degree[rows_reached] += columns
        degree[columns_reached] += rows
        if kernel.from_rows:
            in_degree[columns_reached] += rows
        else:
            in_degree[rows_reached] += columns
    return topology


@runtime_checkable
class Gatherable(Protocol):
    """What n nodes gathered: enough to add more of the same."""

    def part(self: G, start: int, stop: int) -> G:
        """Of some of the nodes."""
        ...

    def beside(self: G, other: G) -> G:
        """More that the same nodes gathered."""
        ...


class Shelf:
    """Room for small tensors that stay while large ones come and go; not differentiable.

    A small tensor lands where a large one was just freed, and the next large one no longer fits
    there: without the shelf, a step on GPT-2 small takes three times the memory that it uses.

    Args:
        runs: First and last but one of the nodes of each run that has a place here.
    """

    def __init__(self, runs: tuple[tuple[int, int], ...]):
        self._runs = runs
        self._free = torch.empty(0)
        self._kept: dict[int, dict[str, Tensor]] = {}

    def put(self, run: int, value: G) -> G:
        """A copy of what the nodes of a run gathered, in the room of what was there before."""
        # Whatever is gathered is a dataclass, which a Protocol cannot say to the type checker.
        tensors = {
            f.name: getattr(value, f.name)
            for f in dataclasses.fields(value)  # type: ignore[arg-type]
            if isinstance(getattr(value, f.name), Tensor)
        }
        if run not in self._kept:
            self._kept[run] = {name: self._room(t, run) for name, t in tensors.items()}
        kept = self._kept[run]
        for name, t in tensors.items():
            kept[name].copy_(t)
        return dataclasses.replace(value, **kept)  # type: ignore[type-var]

    def _room(self, like: Tensor, run: int) -> Tensor:
        size, (start, stop) = like.numel(), self._runs[run]
        if self._free.numel() < size or self._free.dtype != like.dtype:  # enough for all nodes
            self._free = like.new_empty(size // (stop - start) * self._runs[-1][1])
        room, self._free = self._free[:size], self._free[size:]
        return room.view(like.shape)


@dataclass(frozen=True, slots=True)
class Runs:
    """All nodes in runs, so that whatever reaches one node of a run reaches all of it.

    Attributes:
        nodes: First and last but one of the nodes of each run.
        reached: For each range that was asked for, the runs it is made of, and where in the range
            each begins and ends.
    """

    nodes: tuple[tuple[int, int], ...]
    reached: tuple[tuple[tuple[int, int, int], ...], ...]

    def gather(
        self, brought: Iterable[G], begin: Sequence[G | None], chunks: int = 1
    ) -> list[G | None]:
        """Put together what the ranges bring, one after the other.

        Args:
            brought: What each range brings.
            begin: What each run has before.
            chunks: How many of them the ranges come from.
        """
        held, shelf = list(begin), None
        if chunks >= MANY_CHUNKS and not torch.is_grad_enabled():
            shelf = Shelf(self.nodes)
        for runs, each in zip(self.reached, brought, strict=True):
            for run, start, stop in runs:
                part = each if len(runs) == 1 else each.part(start, stop)
                known = held[run]
                both = part if known is None else known.beside(part)
                held[run] = both if shelf is None else shelf.put(run, both)
        return held


@lru_cache(maxsize=64)
def runs_of(ranges: tuple[tuple[int, int], ...], nodes: int) -> Runs:
    """The coarsest runs of nodes that no range cuts."""
    cuts = sorted({0, nodes, *itertools.chain.from_iterable(ranges)})
    runs = tuple(itertools.pairwise(cuts))
    number = {start: i for i, (start, _) in enumerate(runs)}
    number[nodes] = len(runs)
    reached = tuple(
        tuple(
            (i, runs[i][0] - start, runs[i][1] - start) for i in range(number[start], number[stop])
        )
        for start, stop in ranges
    )
    return Runs(runs, reached)


def runs_of_chunks(topology: Topology, chunks: Sequence[Chunk]) -> Runs:
    """Runs for the rows and the columns of each piece, in turn."""
    ranges = tuple(side for chunk in chunks for p in chunk for side in (p.rows, p.columns))
    return runs_of(ranges, topology.spec.num_nodes)


@lru_cache(maxsize=64)
def node_activations(spec: NetSpec) -> Int64[Tensor, " N"]:
    """Which of the ``ACTIVATIONS`` each node has, by number."""
    sizes = torch.tensor([neurons.size for neurons in spec.neurons], dtype=torch.long)
    kinds = [ACTIVATIONS.index(neurons.activation) for neurons in spec.neurons]
    return torch.tensor(kinds, dtype=torch.long).repeat_interleave(sizes)


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

    def _scalars(self, of: Kernel | Bias) -> Float[Tensor, "F n"]:
        """What a kernel or a bias holds; of a constant the first feature, the others are 0."""
        if self.spec.is_constant(of.parameter):
            first = torch.arange(len(self.values), device=self.values.device) == 0
            value = CONSTANTS[of.parameter - len(self.spec.shapes)] * first.to(self.values)
            return value[:, None].expand(-1, of.size)
        start = topology_of(self.spec).parameter_start[of.parameter] + of.start
        return self.values[:, start : start + of.size]

    @staticmethod
    def batch(graphs: "Sequence[NeuralGraph]") -> "NeuralGraph":
        """Several networks, of any architectures, as one graph without edges between them.

        What a model answers for each is what it answers for that network alone.

        Raises:
            ValueError: For no graphs, or other numbers of features.
        """
        found = sorted({len(graph.values) for graph in graphs})
        if len(found) != 1:
            raise ValueError(f"expected graphs with one number of features, found {found}")
        specs = [graph.spec for graph in graphs]
        return NeuralGraph(
            functools.reduce(NetSpec.beside, specs),
            torch.cat([graph.values for graph in graphs], dim=1),
        )

    def __str__(self) -> str:
        return f"NeuralGraph of {self.spec}"

    def draw(self, path: str | Path) -> None:
        """Write a picture, .png, .svg or .pdf: see ``l2o_graph.picture``."""
        from l2o_graph.picture import draw  # which needs this module

        draw(self, path)

    def to_data(self) -> "torch_geometric.data.Data":
        """Export to torch-geometric.

        Returns:
            ``x`` (N, F * B) bias features with B the most biases of any node, zero where a node
            has fewer; ``edge_index`` (2, 2E)
            forward edges kernel by kernel and then the same reversed; ``edge_attr``
            (2E, F * K) with K the most positions of any kernel, smaller kernels padded at the
            end; ``activation`` (N,) as ``node_activations`` numbers them; ``loose`` (F, L) what
            lies outside the graph; ``spec``, to come back.
        """
        from torch_geometric.data import Data

        topology = topology_of(self.spec)
        features = len(self.values)
        widest = max((math.prod(k.positions) for k in self.spec.kernels), default=1)
        slots = _slots(topology)
        x = self.values.new_zeros(self.spec.num_nodes, features, max(slots, default=0) + 1)
        for bias, slot in zip(self.spec.biases, slots, strict=True):
            x[slice(*topology.bias(bias)), :, slot] = self._scalars(bias).T
        index, attributes = [torch.zeros(2, 0, dtype=torch.long)], []
        for kernel in self.spec.kernels:
            groups, rows, columns = kernel.grid
            of_rows, of_columns = topology.sides(kernel)
            row = torch.arange(of_rows, of_rows + groups * rows).repeat_interleave(columns)
            column = torch.arange(of_columns, of_columns + groups * columns)
            column = column.view(groups, 1, columns).expand(groups, rows, columns).flatten()
            index.append(torch.stack([row, column] if kernel.from_rows else [column, row]))
            cells = self._scalars(kernel).unflatten(1, (-1, math.prod(kernel.positions)))
            padded = nn.functional.pad(cells, (0, widest - cells.shape[2]))
            attributes.append(padded.transpose(0, 1).flatten(1))
        forward = torch.cat(index, dim=1).to(x.device)
        edges = torch.cat([x.new_zeros(0, features * widest), *attributes])
        loose = [self.parameter(i).reshape(features, -1) for i in self.spec.loose]
        return Data(
            x=x.flatten(1),
            edge_index=torch.cat([forward, forward.flip(0)], dim=1),
            edge_attr=torch.cat([edges, edges]),
            activation=node_activations(self.spec).to(x.device),
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
        slots = _slots(topology)
        x = x.unflatten(1, (-1, max(slots, default=0) + 1))
        features, edge, loose = x.shape[1], 0, 0
        graph = NeuralGraph(spec, x.new_zeros(features, spec.num_parameters))
        for bias, slot in zip(spec.biases, slots, strict=True):
            graph._scalars(bias)[:] = x[slice(*topology.bias(bias)), :, slot].T
        for kernel in spec.kernels:
            count = math.prod(kernel.grid)
            cells = edges[edge : edge + count].reshape(count, features, -1)
            edge += count
            if not spec.is_constant(kernel.parameter):
                cells = cells[:, :, : math.prod(kernel.positions)]
                graph._scalars(kernel)[:] = cells.transpose(0, 1).flatten(1)
        for i in spec.loose:
            size = math.prod(spec.shapes[i])
            part = data.loose[:, loose : loose + size]
            graph.parameter(i)[:] = part.reshape(features, *spec.shapes[i])
            loose += size
        return graph


def _slots(topology: Topology) -> list[int]:
    """For each bias, how many of those before it share a node with it."""
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


def neural_graph(
    network: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
) -> NeuralGraph:
    """A network as a graph, its weights the only feature; print it to see what was understood.

    Args:
        network: A module, or its ``parameters()`` or ``named_parameters()``.
        inputs: A batch for the module: its computation is then followed, whatever it is. Without
            one the structure is inferred from the order of the layers, which is right for a
            sequence of them. A tensor, the arguments, or the named arguments.

    Returns:
        The graph, one feature for each parameter, detached copies in the widest type found.

    Raises:
        ValueError: When there are no parameters, and for a lazy module that was not called yet.
        TypeError: For what is neither a module nor parameters, and for one of TorchScript.
    """
    if isinstance(network, nn.Module):
        check_module(network, "network")
        parameters, spec = list(network.parameters()), None
        for name, p in network.named_parameters():
            check_parameter(p, f"parameter '{name}'")
        if parameters:
            spec = spec_of_module(network) if inputs is None else _followed(network, inputs)
    else:
        if not isinstance(network, Iterable) or isinstance(network, str | Mapping):
            raise TypeError(
                "network: expected a module, or its parameters() or named_parameters(), found "
                + shown(network)
            )
        parameters, names = [], []
        for item in network:
            name, parameter = item if isinstance(item, tuple) else (None, item)
            parameters.append(parameter)
            names += [] if name is None else [name]
        spec = spec_of_parameters(parameters, names or None)
    if spec is None:
        raise ValueError("expected a module with parameters, found none")
    return NeuralGraph(spec, torch.cat([p.detach().reshape(-1) for p in parameters])[None])


def _followed(module: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> NetSpec:
    from l2o_graph.tracing import spec_of_computation  # which needs this module

    if not isinstance(inputs, Tensor | Mapping | Sequence) or isinstance(inputs, str):
        raise TypeError(
            "inputs: expected a tensor, the arguments or the named arguments of the module, found "
            + shown(inputs)
        )
    if isinstance(inputs, Mapping):
        return spec_of_computation(module, (), inputs)
    return spec_of_computation(module, (inputs,) if isinstance(inputs, Tensor) else inputs)
