"""NetSpec: the specification of a network's graph.

A kernel joins two sets of neurons, and a bias is added to one set. A loose parameter has no place
in the graph and is updated on its own.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["input", "hidden", "output"]

# Weights of edges that are not parameters: 1, or 2 on one side of an operation whose sides are not
# interchangeable, as queries and keys of attention.
CONSTANTS = (1.0, 2.0)

# Elementwise activations by the names of torch's functions; "" stands for none or an unknown one
# (torch computes SELU and CELU by elu, ReLU6 by hardtanh). Append new ones at the end, because
# models have an embedding for each.
ACTIVATIONS = (
    "", "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "softplus", "hardswish",
    "hardsigmoid", "hardtanh", "sin", "mish", "logsigmoid",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Neurons:
    """A set of neurons or channels: one layer of nodes.

    Attributes:
        name: Name for display.
        size: Number of neurons.
        role: Role in the network; only neurons of hidden sets are interchangeable.
        depth: Index of the hidden set, counted from the input; 0 for inputs and outputs.
        network: Index of the network within a batch.
        activation: Activation of the neurons, one of the ``ACTIVATIONS``.
    """

    name: str
    size: int
    role: Role
    depth: int
    network: int = 0
    activation: str = ""

    def __str__(self) -> str:
        return f"{self.name} [{self.size}]" + (self.activation and f" {self.activation}")


@dataclass(frozen=True, slots=True)
class Kernel:
    """Edges between two sets of neurons, laid out as a parameter stores them.

    The parameter's scalars from ``start`` on are a grid [groups, rows, columns, *positions], with
    an edge for each (group, row, column). Rows are the neurons written and columns the neurons
    read, as in a convolution, or the reverse, as in an embedding. On both sides, the neurons of
    consecutive groups are adjacent: a diagonal is a grid of groups with one row and column.

    Attributes:
        parameter: Index of the parameter; the ``CONSTANTS`` follow after the last one.
        source: Index of the set of neurons that it reads.
        target: Index of the set of neurons that it writes.
        grid: Number of groups, rows and columns.
        positions: Spatial shape of the kernel; () for a linear layer. A linear layer after a
            flattened feature map is a kernel with one position for each pixel of the map.
        start: Index of its first scalar in the flattened parameter.
        source_start: Index of the first neuron read within its set.
        target_start: Index of the first neuron written within its set.
        from_rows: Whether rows are the neurons read and columns the neurons written.
        again: Whether an earlier kernel or bias owns these scalars (weight tying): they are read
            here and updated there.
        kind: Kind of operation.
    """

    parameter: int
    source: int
    target: int
    grid: tuple[int, int, int]
    positions: tuple[int, ...] = ()
    start: int = 0
    source_start: int = 0
    target_start: int = 0
    from_rows: bool = False
    again: bool = False
    kind: str = "dense"

    @property
    def row(self) -> int:
        """Number of scalars of a row."""
        return self.grid[2] * math.prod(self.positions)

    @property
    def size(self) -> int:
        """Number of scalars."""
        return self.grid[0] * self.grid[1] * self.row


@dataclass(frozen=True, slots=True)
class Bias:
    """Scalars that are added to neurons.

    Attributes:
        parameter: Index of the parameter.
        neurons: Index of the set of neurons.
        size: Number of scalars.
        start: Index of the first one in the flattened parameter.
        neurons_start: Index of the first neuron within the set.
        again: Whether an earlier kernel or bias owns these scalars, as in ``Kernel``.
    """

    parameter: int
    neurons: int
    size: int
    start: int = 0
    neurons_start: int = 0
    again: bool = False


@dataclass(frozen=True, slots=True)
class NetSpec:
    """Specification of a network: which parameter joins which neurons; hashable, without tensors.

    Attributes:
        names: Name of each parameter.
        shapes: Shape of each parameter.
        neurons: Sets of neurons, in the order in which the network computes them.
        kernels: Kernels, which join two sets each.
        biases: Biases, which are added to one set each.
        loose: Indices of the parameters outside the graph.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    neurons: tuple[Neurons, ...]
    kernels: tuple[Kernel, ...]
    biases: tuple[Bias, ...]
    loose: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        """Number of neurons in all sets."""
        return sum(neurons.size for neurons in self.neurons)

    def is_constant(self, parameter: int) -> bool:
        """Return whether an index stands for a constant."""
        return parameter >= len(self.shapes)

    @property
    def constant_size(self) -> int:
        """Largest number of edges of a constant kernel."""
        return max((k.size for k in self.kernels if self.is_constant(k.parameter)), default=0)

    @property
    def num_edges(self) -> int:
        """Number of pairs of neurons joined by a kernel, counted for each kernel."""
        return sum(math.prod(k.grid) for k in self.kernels)

    @property
    def num_parameters(self) -> int:
        """Number of scalars in all parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def beside(self, other: "NetSpec") -> "NetSpec":
        """Join both to a batch of unconnected networks."""
        sets, parameters = len(self.neurons), len(self.shapes)
        networks = self.neurons[-1].network + 1 if self.neurons else 0

        def mine(index: int) -> int:  # constants come after the parameters of both
            return index + len(other.shapes) if self.is_constant(index) else index

        return NetSpec(
            names=self.names + other.names,
            shapes=self.shapes + other.shapes,
            neurons=(
                *self.neurons,
                *(replace(n, network=n.network + networks) for n in other.neurons),
            ),
            kernels=(
                *(replace(k, parameter=mine(k.parameter)) for k in self.kernels),
                *(
                    replace(
                        k,
                        parameter=k.parameter + parameters,
                        source=k.source + sets,
                        target=k.target + sets,
                    )
                    for k in other.kernels
                ),
            ),
            biases=(
                *self.biases,
                *(
                    replace(b, parameter=b.parameter + parameters, neurons=b.neurons + sets)
                    for b in other.biases
                ),
            ),
            loose=(*self.loose, *(i + parameters for i in other.loose)),
        )

    def __str__(self) -> str:
        """Describe the place of each parameter in the graph, one line each."""
        lines = [
            f"{self.num_nodes} neurons, {self.num_edges} edges, {self.num_parameters} parameters"
        ]
        place: dict[int, list[str]] = {}
        for k in self.kernels:
            place.setdefault(k.parameter, []).append(self._place_of(k))
        for b in self.biases:
            place.setdefault(b.parameter, []).append(f"bias of {self.neurons[b.neurons].name}")
        for i in self.loose:
            place.setdefault(i, []).append("loose: updated without the graph")
        for i, name in enumerate(self.names):
            text = "; ".join(dict.fromkeys(place[i]))
            lines.append(f"  {name} {list(self.shapes[i])}: {text}")
        for i, constant in enumerate(CONSTANTS, len(self.shapes)):
            lines += [f"  {constant:g}: {text}" for text in dict.fromkeys(place.get(i, []))]
        return "\n".join(lines)

    def _place_of(self, kernel: Kernel) -> str:
        source, target = self.neurons[kernel.source], self.neurons[kernel.target]
        groups, rows, columns = kernel.grid
        text = f"{source} -> {target}"
        if rows == columns == 1 and groups > 1:
            text += ", one by one"
        elif groups > 1:
            text += f", {groups} groups"
        if kernel.positions:
            text += f", {'x'.join(map(str, kernel.positions))} positions"
        return text + (f" ({kernel.kind})" if kernel.kind not in ("dense", "convolution") else "")
