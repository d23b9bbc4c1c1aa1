"""NetSpec: the neurons of a network and what joins them.

A kernel joins two sets of neurons, a bias sits on one set, and a parameter that fits neither is
loose: it lies outside the graph and is updated from its own features alone.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["input", "hidden", "output"]

# What edges carry that are no parameter: 1, or 2 on one side of an operation that takes its two
# sides differently, as attention does queries and keys.
CONSTANTS = (1.0, 2.0)

# What is applied to neurons one by one, by the names of torch's functions; at first what neurons
# have without any, or with one that is not told (torch brings SELU and CELU to elu, ReLU6 to
# hardtanh). New ones go to the end: models keep a row each.
ACTIVATIONS = (
    "", "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "softplus", "hardswish",
    "hardsigmoid", "hardtanh", "sin", "mish", "logsigmoid",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Neurons:
    """A set of neurons or channels: one layer of nodes.

    Attributes:
        name: Where the set lies, for people.
        size: Number of its neurons.
        role: Neurons of a hidden set are interchangeable, each input and output is itself.
        depth: Hidden sets counted from the input, starting at 0; 0 for inputs and outputs.
        network: Which network of a batch it belongs to.
        activation: What is applied to them, one of the ``ACTIVATIONS``.
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

    The parameter's scalars from ``start`` on are a grid [groups, rows, columns, *positions], one
    edge for each (group, row, column). Rows are the neurons written and columns the neurons read,
    as in a convolution, or the other way round, as in an embedding. On both sides the neurons of
    a group follow those of the group before: a diagonal is a grid of groups of one row and column.

    Attributes:
        parameter: Its index among the parameters; behind them come the ``CONSTANTS``.
        source: Index of the set of neurons that it reads.
        target: Index of the set of neurons that it writes.
        grid: Groups, rows and columns.
        positions: Spatial shape of the kernel; () for a linear layer. A linear layer behind a
            flattened feature map is a kernel with one position for each pixel of the map.
        start: First scalar of the flattened parameter that it holds.
        source_start: First neuron that it reads, within its set.
        target_start: First neuron that it writes, within its set.
        from_rows: Whether rows are what is read and columns what is written.
        again: Whether an earlier kernel or bias owns these scalars (weight tying): they are read
            here and updated there.
        kind: What it does, for people and for models that ask.
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
        """Scalars of a row."""
        return self.grid[2] * math.prod(self.positions)

    @property
    def size(self) -> int:
        """Scalars in all."""
        return self.grid[0] * self.grid[1] * self.row


@dataclass(frozen=True, slots=True)
class Bias:
    """Scalars that sit on the neurons they are added to.

    Attributes:
        parameter: Index of the parameter.
        neurons: Index of the set.
        size: Number of scalars.
        start: First of them within the flattened parameter.
        neurons_start: First neuron within the set.
        again: As of a kernel.
    """

    parameter: int
    neurons: int
    size: int
    start: int = 0
    neurons_start: int = 0
    again: bool = False


@dataclass(frozen=True, slots=True)
class NetSpec:
    """Which parameter of a network joins which neurons; hashable, and free of tensors.

    Attributes:
        names: A name for each parameter.
        shapes: Shape of each parameter.
        neurons: The sets of neurons, in the order in which the network computes them.
        kernels: What joins two sets.
        biases: What sits on one set.
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
        """Neurons in all sets together."""
        return sum(neurons.size for neurons in self.neurons)

    def is_constant(self, parameter: int) -> bool:
        """Whether an index stands for a constant."""
        return parameter >= len(self.shapes)

    @property
    def constant_size(self) -> int:
        """Most scalars that a kernel reads of a constant."""
        return max((k.size for k in self.kernels if self.is_constant(k.parameter)), default=0)

    @property
    def num_edges(self) -> int:
        """Pairs of neurons joined by a kernel, each counted once for each kernel."""
        return sum(math.prod(k.grid) for k in self.kernels)

    @property
    def num_parameters(self) -> int:
        """Scalars in all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def beside(self, other: "NetSpec") -> "NetSpec":
        """Both as one batch: networks that have nothing to do with each other."""
        sets, parameters = len(self.neurons), len(self.shapes)
        networks = self.neurons[-1].network + 1 if self.neurons else 0

        def mine(index: int) -> int:  # the constants come behind the parameters of both
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
        """One line for each parameter: what was understood of it."""
        lines = [
            f"{self.num_nodes} neurons, {self.num_edges} edges, {self.num_parameters} parameters"
        ]
        place: dict[int, list[str]] = {}
        for k in self.kernels:
            place.setdefault(k.parameter, []).append(self._place_of(k))
        for b in self.biases:
            place.setdefault(b.parameter, []).append(f"bias of {self.neurons[b.neurons].name}")
        for i in self.loose:
            place.setdefault(i, []).append("loose: updated from its own features alone")
        for i, name in enumerate(self.names):
            said = "; ".join(dict.fromkeys(place[i]))
            lines.append(f"  {name} {list(self.shapes[i])}: {said}")
        for i, constant in enumerate(CONSTANTS, len(self.shapes)):
            lines += [f"  {constant:g}: {said}" for said in dict.fromkeys(place.get(i, []))]
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
