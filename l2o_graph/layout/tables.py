"""Integer tables of architectures, from which batches of networks are assembled.

There is no Python loop over the networks of a batch: each table of a batch takes a few operations
on the tables of the architectures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from l2o_graph.layout.arrivals import counted
from l2o_graph.layout.blocks import topology_of
from l2o_graph.layout.segments import DirectedEdges, KernelTable, directed_edges
from l2o_graph.layout.spec import ACTIVATIONS, CONSTANTS, Kernel, NetSpec

R = TypeVar("R")

# Activations with an embedding, as in Kofinas et al. 2024; any other counts as none.
KNOWN_ACTIVATIONS = ACTIVATIONS[:7]
NO_ACTIVATION = len(KNOWN_ACTIVATIONS)  # for inputs and outputs, which have no embedding


@dataclass(frozen=True, slots=True)
class Capacity:
    """Largest sizes of networks that a model can read.

    Attributes:
        kernel: Side of the largest kernel.
        inputs: Largest number of input neurons.
        depth: Number of hidden layers with a position each; deeper ones share the last.
        classes: Largest number of output neurons.
    """

    kernel: int
    inputs: int
    depth: int
    classes: int

    @property
    def positions(self) -> int:
        """Number of position embeddings."""
        return self.inputs + self.depth + self.classes


@dataclass(frozen=True, slots=True)
class Layout:
    """Tables of the graph of one architecture.

    Attributes:
        parameters: Number of scalars of a network.
        kernels: First scalar of each kernel (for a constant, its index), whether it is a constant,
            groups, rows, columns, height, width, node of the first row, node of the first column,
            whether rows are read, and whether it is a linear layer.
        biases: First scalar of each bias, its size and its first node.
        nodes: Position of each node, its activation and whether it is an output.
        outputs: Output nodes, padded with -1 in front.
    """

    parameters: int
    kernels: Int64[Tensor, "k 11"]
    biases: Int64[Tensor, "b 3"]
    nodes: Int64[Tensor, "N 3"]
    outputs: Int64[Tensor, " classes"]


def layout_of(spec: NetSpec, room: Capacity) -> Layout:
    """Compute the tables of an architecture.

    Raises:
        ValueError: For a kernel, or a number of inputs or outputs, that exceeds the capacity.
    """
    ends = ("input", "output")
    sizes = {role: sum(n.size for n in spec.neurons if n.role == role) for role in ends}
    for role, most in (("input", room.inputs), ("output", room.classes)):
        if not 1 <= sizes[role] <= most:
            raise ValueError(f"network: expected 1 to {most} {role}s, found {sizes[role]}")
    topology, kernels = topology_of(spec), []
    for k in spec.kernels:
        constant = spec.is_constant(k.parameter)
        first = k.parameter - len(spec.shapes) if constant else topology.first_scalar(k)
        dense = k.kind == "dense" and not k.positions and not constant
        kernels.append(
            [
                first,
                constant,
                *k.grid,
                *_sides(spec, k, room),
                *topology.sides(k),
                k.from_rows,
                dense,
            ]
        )
    biases = [[topology.first_scalar(b), b.size, topology.bias(b)[0]] for b in spec.biases]
    nodes = _nodes(spec, room, room.positions - sizes["output"])
    outputs = torch.full((room.classes,), -1)
    outputs[room.classes - sizes["output"] :] = nodes[:, 2].nonzero().flatten()
    return Layout(
        spec.num_parameters,
        torch.tensor(kernels, dtype=torch.long).view(-1, 11),
        torch.tensor(biases, dtype=torch.long).view(-1, 3),
        nodes,
        outputs,
    )


def _sides(spec: NetSpec, kernel: Kernel, room: Capacity) -> tuple[int, int]:
    """Return height and width of a kernel."""
    sides = (1,) * (2 - len(kernel.positions)) + kernel.positions
    if len(sides) > 2 or max(sides) > room.kernel:
        what = f"kernel {'x'.join(map(str, sides))}"
        if kernel.kind == "dense":  # after a flattening
            what = f"a linear layer on {math.prod(sides)} positions of each channel"
        raise ValueError(
            f"parameter '{spec.names[kernel.parameter]}': {what} exceeds max_kernel "
            f"{room.kernel}x{room.kernel}"
        )
    return sides[0], sides[1]


def _nodes(spec: NetSpec, room: Capacity, output: int) -> Int64[Tensor, "N 3"]:
    rows, at = [], {"input": 0, "output": output}
    for neurons in spec.neurons:
        if neurons.role == "hidden":
            position = room.inputs + min(neurons.depth, room.depth - 1)
            kind = ACTIVATIONS.index(neurons.activation)
            kind = kind if kind < NO_ACTIVATION else 0
            rows += [[position, kind, 0]] * neurons.size
            continue
        first = at[neurons.role]
        at[neurons.role] += neurons.size
        is_output = neurons.role == "output"
        rows += [[first + i, NO_ACTIVATION, is_output] for i in range(neurons.size)]
    return torch.tensor(rows, dtype=torch.long)


@dataclass(frozen=True, slots=True)
class Batch:
    """I networks as one graph, with N nodes and E edges, linear layers' edges last.

    Attributes:
        scalars: Index of each scalar of each kernel, in order, in the concatenation of all
            networks' parameters and the ``CONSTANTS``.
        fan_in: Number of scalars of the same kernel that lead to the same neuron; 1 for constants.
        filled: Mask of the positions of the largest kernel that an edge has.
        dense: Number of edges of linear layers.
        biases: Index of each bias scalar.
        biased: Node of each bias scalar.
        positions: Position of each node.
        activations: Index in ``KNOWN_ACTIVATIONS`` of each node's activation, or ``NO_ACTIVATION``.
        outputs: Output nodes of each network, as indices among the output nodes of all networks,
            padded in front with the number of these.
        directed: Directed edges.
    """

    scalars: Int64[Tensor, " n"]
    fan_in: Int64[Tensor, " n"]
    filled: Bool[Tensor, "E K"]
    dense: int
    biases: Int64[Tensor, " b"]
    biased: Int64[Tensor, " b"]
    positions: Int64[Tensor, " N"]
    activations: Int64[Tensor, " N"]
    outputs: Int64[Tensor, "I classes"]
    directed: DirectedEdges

    def to(self, device: torch.device) -> "Batch":
        """Move all tensors to a device."""
        return _moved(self, device)

    def kernels(self, values: Float[Tensor, " P"], scaled: bool) -> Float[Tensor, "E K"]:
        """Extract the kernels of all edges from all networks' parameters, padded with zeros.

        ``scaled`` multiplies weights by the root of their fan-in. This undoes the scaling of usual
        initialisations, so that weights are about equally large in every layer.
        """
        known = torch.cat([values, values.new_tensor(CONSTANTS)])[self.scalars]
        if scaled:
            known = known * self.fan_in.to(values).sqrt()
        padded = values.new_zeros(self.filled.shape)
        return padded.masked_scatter_(self.filled, known)

    def offsets(self, values: Float[Tensor, " P"]) -> Float[Tensor, " N"]:
        """Extract the biases of all nodes; several of one node are added up."""
        nothing = values.new_zeros(len(self.positions))
        return nothing.index_add_(0, self.biased, values[self.biases])


def _moved(record: R, device: torch.device) -> R:
    """Move the tensors of a dataclass, and of those nested in it, to a device."""
    # A TypeVar cannot tell the type checker that these are dataclasses.
    changes: dict[str, Any] = {}
    for field in fields(record):  # type: ignore[arg-type]  a dataclass
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.to(device)
        elif is_dataclass(value):
            changes[field.name] = _moved(value, device)
    return replace(record, **changes)  # type: ignore[type-var]  a dataclass


class ArchitectureTables:
    """Concatenated tables of some architectures, for the same capacity."""

    def __init__(self, layouts: Sequence[Layout], room: Capacity):
        self.side = room.kernel
        self.parameters = torch.tensor([layout.parameters for layout in layouts])
        self.kernels = _Table([layout.kernels for layout in layouts])
        self.biases = _Table([layout.biases for layout in layouts])
        self.nodes = _Table([layout.nodes for layout in layouts])
        self.outputs = torch.stack([layout.outputs for layout in layouts])

    def batch(self, which: Int64[Tensor, " I"], both_ways: bool) -> Batch:
        """Assemble a batch of networks, with edges in both directions or only along the flow."""
        sizes, parameters = self.nodes.count[which], self.parameters[which]
        first_node, first_scalar = sizes.cumsum(0) - sizes, parameters.cumsum(0) - parameters
        total = int(parameters.sum())

        network, kernels = self.kernels.of(which)
        last = kernels[:, 10].argsort(stable=True)
        network, kernels = network[last], kernels[last]
        start, constant, groups, rows, columns, height, width, row, column = kernels[:, :9].T
        start = start + torch.where(constant > 0, total, first_scalar[network])
        count = groups * rows * columns
        kernel, number = counted(count * height * width)
        own = torch.arange(len(kernels)).repeat_interleave(count)
        from_rows = kernels[:, 9] > 0
        fan_in = torch.where(from_rows, rows, columns) * height * width
        _, nodes = self.nodes.of(which)
        to, biases = self.biases.of(which)
        bias, step = counted(biases[:, 1])
        grids = KernelTable(
            groups, rows, columns, row + first_node[network], column + first_node[network],
            from_rows,
        )  # fmt: skip
        # Only output nodes have final states, so they are indexed among themselves.
        outputs = self.outputs[which]
        absent = outputs < 0
        number_of_output = (~absent).flatten().cumsum(0).view(outputs.shape) - 1
        return Batch(
            scalars=start[kernel] + number * (constant == 0)[kernel],
            fan_in=torch.where(constant > 0, 1, fan_in)[kernel],
            filled=_filled(height, width, self.side)[own],
            dense=int((count * kernels[:, 10]).sum()),
            biases=(biases[:, 0] + first_scalar[to])[bias] + step,
            biased=(biases[:, 2] + first_node[to])[bias] + step,
            positions=nodes[:, 0],
            activations=nodes[:, 1],
            outputs=number_of_output.masked_fill(absent, int((~absent).sum())),
            directed=directed_edges(grids, sizes, nodes[:, 2] > 0, both_ways),
        )


class _Table:
    """Concatenated rows of several architectures."""

    def __init__(self, tables: Sequence[Int64[Tensor, "_ columns"]]):
        self.rows = torch.cat(list(tables))
        self.count = torch.tensor([len(table) for table in tables])
        self.first = self.count.cumsum(0) - self.count

    def of(self, which: Int64[Tensor, " I"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, "n c"]]:
        """Return the rows of networks of these architectures, and the network of each row."""
        owner, number = counted(self.count[which])
        return owner, self.rows[self.first[which][owner] + number]


def _filled(
    height: Int64[Tensor, " k"], width: Int64[Tensor, " k"], side: int
) -> Bool[Tensor, "k K"]:
    """Mark the positions of a square that a centred kernel covers."""
    place = torch.arange(side)
    inside = []
    for size in (height[:, None], width[:, None]):
        before = (side - size) // 2
        inside.append((place >= before) & (place < before + size))
    return (inside[0][:, :, None] & inside[1][:, None]).flatten(1)
