"""nn.Module, or bare parameters -> NetSpec: the neurons of a network and what joins them.

A kernel joins two sets of neurons, a bias sits on one set, and a parameter that fits neither is
loose: it has no place in the graph and is updated from its own features alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Role = Literal["input", "hidden", "output"]

# Modules whose weight is [out, in, *positions]; every other module's parameters are loose.
KERNEL_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Neurons:
    """A set of neurons or channels: one layer of nodes.

    Attributes:
        name: Where the set lies, for people.
        size: How many neurons it holds.
        role: Neurons of a hidden set are interchangeable, each input and output is itself.
        depth: Hidden sets counted from the input, starting at 0; 0 for inputs and outputs.
    """

    name: str
    size: int
    role: Role
    depth: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """Edges between two sets of neurons, laid out as a parameter stores them.

    The parameter's scalars from ``start`` on are a grid [groups, rows, columns, *positions], one
    edge for each (group, row, column). Rows are the neurons written and columns the neurons read,
    as in a convolution, or the other way round, as in an embedding. On both sides the neurons of
    a group follow those of the group before: a diagonal is a grid of groups of one row and column.

    Attributes:
        parameter: Its index among the parameters; ``NetSpec.one`` for edges of the constant 1.
        source: Index of the set of neurons that it reads.
        target: Index of the set of neurons that it writes.
        grid: Groups, rows and columns.
        positions: Spatial shape of the kernel; () for a linear layer. A linear layer behind a
            flattened feature map is a kernel with one position for each pixel of the map.
        start: First scalar of the flattened parameter that it holds.
        source_start: First neuron that it reads, within its set.
        target_start: First neuron that it writes, within its set.
        from_rows: Whether rows are what is read and columns what is written.
        again: Whether another kernel holds these scalars too, and says how to update them.
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
        size: How many scalars.
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

    @property
    def one(self) -> int:
        """The index that stands for the constant 1, of as many scalars as are asked for."""
        return len(self.shapes)

    @property
    def num_ones(self) -> int:
        """Most scalars that a kernel reads of the constant 1."""
        return max((k.size for k in self.kernels if k.parameter == self.one), default=0)

    @property
    def num_edges(self) -> int:
        """Pairs of neurons joined by a kernel, each counted once for each kernel."""
        return sum(math.prod(k.grid) for k in self.kernels)

    @property
    def num_parameters(self) -> int:
        """Scalars in all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def __str__(self) -> str:
        """One line for each parameter: what was understood of it."""
        lines = [
            f"{self.num_nodes} neurons, {self.num_edges} edges, {self.num_parameters} parameters"
        ]
        place = {i: "loose: updated from its own features alone" for i in self.loose}
        for k in self.kernels:
            source, target = self.neurons[k.source], self.neurons[k.target]
            place[k.parameter] = (
                f"{source.name} [{source.size}] -> {target.name} [{target.size}]"
                + (f", {'x'.join(map(str, k.positions))} positions" if k.positions else "")
            )
        for b in self.biases:
            place[b.parameter] = f"bias of {self.neurons[b.neurons].name}"
        for i, name in enumerate(self.names):
            lines.append(f"  {name} {list(self.shapes[i])}: {place[i]}")
        return "\n".join(lines)


def spec_of_module(module: nn.Module) -> NetSpec:
    """Read a network whose linear and convolutional layers are registered in computing order.

    Args:
        module: An MLP or a CNN with global pooling or flattening before its linear layers.

    Returns:
        The specification, parameters in the order of ``module.parameters()``.
    """
    named = list(module.named_parameters())
    index = {id(p): i for i, (_, p) in enumerate(named)}
    kernels, bias_of = [], {}
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        if isinstance(part, KERNEL_MODULES) and getattr(part, "groups", 1) == 1:
            weight = index.get(id(own.get("weight")))
            if weight is not None:
                kernels.append(weight)
                if "bias" in own:
                    bias_of[index[id(own["bias"])]] = weight
    names, shapes = [name for name, _ in named], [tuple(p.shape) for _, p in named]
    return _chain(names, shapes, sorted(set(kernels)), bias_of)


def spec_of_parameters(parameters: Iterable[Tensor], names: Sequence[str] | None = None) -> NetSpec:
    """Read a network from its bare parameters, by their order and shapes.

    A tensor with two or more axes is a kernel [out, in, *positions]. Vectors of the length of
    its output that follow it are read as norms read theirs: a lone one, or the first of three,
    is the kernel's bias, and a pair belongs to a norm and stays loose. With names, the bias is
    the vector whose name shares the kernel's prefix, wherever it stands. What this cannot see is
    anything but a chain of layers: residual additions, branches, transposed or grouped kernels.

    Args:
        parameters: Tensors in the order in which the network uses them.
        names: Their names, as ``named_parameters()`` gives them.

    Returns:
        The specification, parameters in the order given.

    Raises:
        ValueError: When there are no parameters.
    """
    shapes = [tuple(p.shape) for p in parameters]
    if not shapes:
        raise ValueError("expected at least one parameter, found an empty list")
    kernels = [i for i, shape in enumerate(shapes) if len(shape) >= 2]
    bias_of = {}
    for i, shape in enumerate(shapes):
        if len(shape) != 1:
            continue
        if names is None:
            owner = i - 1 if _is_bias_by_order(shapes, i) else None
        else:
            prefix = _prefix(names[i])
            owner = next((k for k in kernels if _prefix(names[k]) == prefix), None)
        if owner is not None:
            bias_of[i] = owner
    names = names or [f"parameter {i}" for i in range(len(shapes))]
    return _chain(names, shapes, kernels, bias_of)


def _prefix(name: str) -> str:
    return name.rpartition(".")[0]


def _is_bias_by_order(shapes: Sequence[tuple[int, ...]], i: int) -> bool:
    """Whether vector i comes right after a kernel of its length, in an odd run of vectors."""
    if i == 0 or len(shapes[i - 1]) < 2 or shapes[i] != shapes[i - 1][:1]:
        return False
    run = 0
    while i + run < len(shapes) and shapes[i + run] == shapes[i]:
        run += 1
    return run % 2 == 1


def _chain(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    weights: Sequence[int],
    bias_of: dict[int, int],
) -> NetSpec:
    """Join kernels end to end: each reads the neurons that the one before it wrote.

    A kernel that does not fit the neurons before it starts a set of its own, of unknown origin
    and therefore hidden. That may grant the network a symmetry it lacks, never deny it one.

    Args:
        names: Of the parameters.
        shapes: Of the parameters.
        weights: Which of them are kernels, in order.
        bias_of: Bias -> kernel whose output it is added to, among the parameters.
    """
    sets: list[tuple[str, int]] = []
    kernels: list[Kernel] = []
    for i in weights:
        shape, last = shapes[i], len(sets) - 1
        if 0 in shape:  # nothing to join
            continue
        positions = _positions(shape, sets[last][1] if sets else None, kernels)
        if positions is None:
            sets.append((f"before {names[i]}", shape[1]))
            last, positions = last + 1, shape[2:]
        sets.append((_prefix(names[i]) or names[i], shape[0]))
        grid = (1, shape[0], math.prod(shape[1:]) // math.prod(positions))
        kernels.append(Kernel(i, last, last + 1, grid, positions))
    written = {kernel.parameter: kernel.target for kernel in kernels}
    biases: dict[int, int] = {}  # set of neurons -> its bias
    for i, kernel in bias_of.items():
        target = written.get(kernel)
        if target is not None and target not in biases and shapes[i] == (sets[target][1],):
            biases[target] = i
    placed = {*written, *biases.values()}
    neurons = tuple(
        Neurons("input", size, "input", 0)
        if s == 0
        else Neurons("output", size, "output", 0)
        if s == len(sets) - 1
        else Neurons(name, size, "hidden", s - 1)
        for s, (name, size) in enumerate(sets)
    )
    return NetSpec(
        names=tuple(names),
        shapes=tuple(shapes),
        neurons=neurons,
        kernels=tuple(kernels),
        biases=tuple(Bias(biases[s], s, sets[s][1]) for s in sorted(biases)),
        loose=tuple(i for i in range(len(shapes)) if i not in placed),
    )


def _positions(
    shape: tuple[int, ...], size: int | None, kernels: Sequence[Kernel]
) -> tuple[int, ...] | None:
    """Positions of a kernel that reads a set of this size, or None where it does not fit it."""
    if shape[1] == size:
        return shape[2:]
    # A linear layer behind a flattened feature map: torch flattens channel first, so each
    # channel's pixels lie together, and [out, C * pixels] is [out, C, pixels] without a copy.
    after_convolution = bool(kernels) and len(kernels[-1].positions) > 0
    if size and after_convolution and len(shape) == 2 and shape[1] % size == 0:
        pixels = shape[1] // size
        side = math.isqrt(pixels)
        return (side, side) if side * side == pixels else (pixels,)
    return None
