"""Construction of a network's graph during tracing: sets of neurons, kernels and biases."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from l2o_graph.layout.spec import Bias, Kernel, NetSpec, Neurons, Role
from l2o_graph.tracing.labels import Axis, Factor, Label, require

# Largest number of kernels that connect two sets; larger rearrangements are not followed.
MOST_GRIDS = 4096


@dataclass(slots=True)
class NodeSet:
    """Set of neurons under construction.

    Attributes:
        name: Name for display.
        size: Number of neurons.
        role: Role in the network.
        fresh: Whether no activation was applied to the neurons and no operation has read them.
        activation: Activation of the neurons, one of the ``ACTIVATIONS``.
        is_ordered: Whether an operation that cannot be followed reads the neurons, and may depend
            on their order.
    """

    name: str
    size: int
    role: Role
    fresh: bool = True
    activation: str = ""
    is_ordered: bool = False


class NeuronRange(NamedTuple):
    """Neurons that a layer reads along an axis: one contiguous range of a set.

    Attributes:
        label: Label of the tensor.
        set: Index of the set.
        start: First neuron.
        size: Number of neurons.
        inside: Factors of data inside of each neuron, such as the pixels of a flattened map.
    """

    label: Label
    set: int
    start: int
    size: int
    inside: Axis


class Builder:
    """Graph under construction.

    Attributes:
        names: Names of the parameters.
        shapes: Shapes of the parameters.
        sets: Sets of neurons.
        kernels: Kernels, in the order of the computation.
        biases: Biases, in the order of the computation.
        placed: Parameters of kernels and biases, in the order of the computation.
        recent_reads: Sets that were read since it was last cleared.
        exposed: Parameters read by operations that cannot be followed: their neurons keep their
            order.

    Args:
        names: Names of the parameters.
        shapes: Shapes of the parameters.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]):
        self.names, self.shapes = list(names), list(shapes)
        self.sets: list[NodeSet] = []
        self.kernels: list[Kernel] = []
        self.biases: list[Bias] = []
        self.placed: list[int] = []
        self.recent_reads: set[int] = set()
        self.exposed: set[int] = set()
        self._merges = 0

    # Neurons ------------------------------------------------------------------------------------

    def new_set(self, name: str, size: int, role: Role = "hidden") -> int:
        """Add a set of neurons; return its index."""
        self.sets.append(NodeSet(name, size, role))
        return len(self.sets) - 1

    def new_merge(self, kind: str, size: int) -> int:
        """Add a set whose neurons other sets are connected to by constants; return its index."""
        self._merges += 1
        return self.new_set(f"{kind} {self._merges}", size)

    def new_inputs(self, name: str, size: int) -> int:
        """Add a set of inputs, each distinguishable, such as pixels or tokens; return its index."""
        return self.new_set(name, size, "input")

    def read_axis(self, label: Label, axis: int, name: str) -> NeuronRange:
        """Read the neurons along an axis of a label in the layer ``name``.

        Data becomes a set of inputs, and neurons in another order are connected to a new set.
        """
        factors = label.axes[axis]
        if all(f.set is None for f in factors):
            size = math.prod(f.size for f in factors)
            own = Factor(size, self.new_inputs(f"input of {name}", size), 1)
            label = label.with_axis(axis, (own,))
        elif not _is_contiguous(factors):
            target = self.new_merge("rearranged", math.prod(f.size for f in factors))
            large = row_major([f.size for f in factors], target)
            self.copy(label, factors, large, 0, "rearranged")
            label = label.with_axis(axis, (Factor(self.sets[target].size, target, 1),)).pruned()
        first, *inside = label.axes[axis]
        assert first.set is not None
        self.mark_read(first.set)
        start = label.start.get(first.set, 0)
        return NeuronRange(label, first.set, start, first.size, tuple(inside))

    def mark_read(self, *sets: int) -> None:
        """Record that sets are read."""
        for s in sets:
            self.sets[s].fresh = False
            self.recent_reads.add(s)

    # Kernels and biases -------------------------------------------------------------------------

    def add_kernel(self, kernel: Kernel) -> None:
        """Add a kernel."""
        self.kernels.append(replace(kernel, again=self._is_owned(kernel)))
        self.placed.append(kernel.parameter)

    def add_bias(self, bias: Bias) -> None:
        """Add a bias."""
        self.biases.append(replace(bias, again=self._is_owned(bias)))
        self.placed.append(bias.parameter)

    def _is_owned(self, new: Kernel | Bias) -> bool:
        """Return whether another kernel or bias owns any of its scalars."""
        uses = (*self.kernels, *self.biases)
        return any(_overlap(use, new) for use in uses if not use.again)

    def connect(
        self, large: Sequence[Factor], small: Sequence[Factor], starts: tuple[int, int],
        large_reads: bool, kind: str, constant: int = 0,
    ) -> None:  # fmt: skip
        """Connect two sets elementwise by edges of a constant, an index into the ``CONSTANTS``.

        ``large`` are factors that enumerate the neurons of the larger set, outermost first, and
        ``small`` factors of the same sizes for the smaller set, with stride 0 where neurons of the
        larger set share one of the smaller. ``starts`` are the first neurons. Edges lead to the
        larger set if ``large_reads``, else from it.

        Raises:
            NotFollowed: If that takes more than ``MOST_GRIDS`` kernels.
        """
        grids = _grids(large, small, *starts)
        sets = [next(f.set for f in each if f.set is not None) for each in (large, small)]
        self.mark_read(*sets)
        read, written = (1, 0) if large_reads else (0, 1)
        for groups, rows, *firsts in grids:
            self.add_kernel(
                Kernel(
                    len(self.shapes) + constant, sets[read], sets[written], (groups, rows, 1),
                    source_start=firsts[read], target_start=firsts[written],
                    from_rows=not large_reads, kind=kind,
                )
            )  # fmt: skip

    def copy(
        self, label: Label, factors: Sequence[Factor], large: Sequence[Factor], at: int, kind: str
    ) -> None:
        """Connect all that ``factors`` of a label enumerate to the neurons of a set, one to one.

        ``large`` are factors of the same sizes of the set, from its neuron ``at`` on. Varying data
        among the factors is connected as places, one input per step.
        """
        for s in dict.fromkeys(f.set for f in factors if not f.is_expanded):
            if s is None:
                sizes = [f.size for f in factors if f.set is None and not f.is_expanded]
                place = iter(row_major(sizes, self.new_inputs("places", math.prod(sizes))))
                small = [
                    next(place) if f.set is None and not f.is_expanded else Factor(f.size)
                    for f in factors
                ]
                start = 0
            else:
                small = [f.within(s) for f in factors]
                start = label.start.get(s, 0)
            self.connect(large, small, (at, start), True, kind)
        for s in {f.set for f in large if f.set is not None}:
            self.sets[s].fresh = True

    def is_connected(self, source: int, target: int) -> bool:
        """Return whether a constant connects one set to another."""
        return any(
            k.source == source and k.target == target and k.parameter >= len(self.shapes)
            for k in self.kernels
        )

    def add_tables(self, parameters: Iterable[int]) -> None:
        """Add parameters of two or more axes without a place as tables, looked up row by row."""
        for i in parameters:
            rows, *rest = self.shapes[i] or (1,)
            columns = math.prod(rest)
            if i not in self.placed and rest and rows * columns:
                self.add_table(i, self.names[i], rows, columns)

    def add_table(
        self, parameter: int, name: str, rows: int, columns: int, start: int = 0
    ) -> Kernel:
        """Add a table: a kernel from its rows, each a distinct input, to a new set; return it."""
        source, target = self.new_inputs(f"rows of {name}", rows), self.new_set(name, columns)
        grid = (1, rows, columns)
        kernel = Kernel(parameter, source, target, grid, (), start, from_rows=True, kind="lookup")
        self.add_kernel(kernel)
        return kernel

    def fix_order(self, sets: Iterable[int | None]) -> None:
        """Record that an operation reads sets that may depend on the order of their neurons."""
        for s in sets:
            if s is not None:
                self.sets[s].is_ordered = True

    def add_places(self, s: int) -> None:
        """Connect each neuron of a set to a place node, as constants distinguish them."""
        size = self.sets[s].size
        own = self.new_inputs("places", size)
        self.add_kernel(Kernel(len(self.shapes), own, s, (size, 1, 1), kind="places"))

    # Tied parameters ----------------------------------------------------------------------------

    def _tie(self) -> None:
        """Connect the neurons of all uses of a parameter, which can only be permuted together."""
        uses = [k for k in (*self.kernels, *self.biases) if k.parameter < len(self.shapes)]
        for use in uses:
            if use.again:
                first = next(one for one in uses if not one.again and _overlap(one, use))
                self._tie_pair(first, use)

    def _tie_pair(self, first: Kernel | Bias, again: Kernel | Bias) -> None:
        ours, theirs = sides(first), sides(again)
        same_layout = (first.start, [n for *_, n in ours]) == (again.start, [n for *_, n in theirs])
        if not same_layout:  # layouts differ: no common permutation is known
            self._set_outputs(s for s, *_ in (*ours, *theirs))
            return
        for (s, at, n), (t, there, _) in zip(ours, theirs, strict=True):
            ordered = self.sets[s].role != "hidden" and self.sets[t].role != "hidden"
            if not ordered and not self._are_tied(s, at, t, there, n):
                self.add_kernel(
                    Kernel(
                        len(self.shapes), s, t, (n, 1, 1), source_start=at, target_start=there,
                        kind="tied",
                    )
                )  # fmt: skip

    def _are_tied(self, s: int, at: int, t: int, there: int, n: int) -> bool:
        """Return whether one-to-one edges connect n neurons of s from ``at`` to those of t."""
        links: dict[int, list[tuple[int, int, int, int]]] = {}
        for k in self.kernels:
            if k.grid[1:] == (1, 1):
                a, b = (k.source, k.source_start), (k.target, k.target_start)
                links.setdefault(a[0], []).append((a[1], b[0], b[1], k.grid[0]))
                links.setdefault(b[0], []).append((b[1], a[0], a[1], k.grid[0]))
        seen, waiting = {(s, at)}, [(s, at)]
        while waiting:
            here, first = waiting.pop()
            for begin, other, begins, count in links.get(here, []):
                if begin <= first and first + n <= begin + count:
                    found = other, begins + first - begin
                    if found not in seen:
                        seen.add(found)
                        waiting.append(found)
        return (t, there) in seen

    # Specification ------------------------------------------------------------------------------

    def spec(self, outputs: Sequence[int]) -> NetSpec:
        """Return the specification; without ``outputs``, sets that no kernel reads are outputs."""
        read = {k.source for k in self.kernels if k.source != k.target}
        last = set(outputs) or set(range(len(self.sets))) - read
        self._set_outputs(last | {n for n, found in enumerate(self.sets) if found.is_ordered})
        self._tie()
        exposed = [u for u in (*self.kernels, *self.biases) if u.parameter in self.exposed]
        self._set_outputs(s for use in exposed for s, *_ in sides(use))
        self._complete_tables()
        kernels, biases, loose = self._owned()
        depths = self._depths()
        return NetSpec(
            names=tuple(self.names),
            shapes=tuple(self.shapes),
            neurons=tuple(
                Neurons(f.name, f.size, f.role, depths[n], activation=f.activation)
                for n, f in enumerate(self.sets)
            ),
            kernels=tuple(kernels),
            biases=tuple(biases),
            loose=tuple(loose),
        )

    def _set_outputs(self, sets: Iterable[int]) -> None:
        """Turn hidden sets into outputs, whose neurons keep their order."""
        for s in sets:
            if self.sets[s].role == "hidden":
                self.sets[s].role = "output"

    def _complete_tables(self) -> None:
        """Extend kernels of tables to rows that were not used."""
        uses = Counter(use.parameter for use in (*self.kernels, *self.biases))
        for i, table in enumerate(self.kernels):
            if table.kind != "lookup" or uses[table.parameter] > 1:
                continue
            total, width = math.prod(self.shapes[table.parameter]), table.grid[2]
            rows = total // width
            whole = table.from_rows and not table.positions and rows * width == total
            if whole and table.grid[:2] != (1, rows) and table.start % width == 0:
                self.kernels[i] = replace(table, grid=(1, rows, width), start=0)
                self.sets[table.source].size = rows

    def _owned(self) -> tuple[list[Kernel], list[Bias], list[int]]:
        """Return kernels, biases and loose parameters: those with scalars that no use owns."""
        held = [0] * len(self.shapes)
        for k in (*self.kernels, *self.biases):
            if not k.again and k.parameter < len(held):
                held[k.parameter] += k.size
        loose = {i for i, shape in enumerate(self.shapes) if held[i] != math.prod(shape)}
        kernels = [replace(k, again=True) if k.parameter in loose else k for k in self.kernels]
        biases = [replace(b, again=True) if b.parameter in loose else b for b in self.biases]
        return kernels, biases, sorted(loose)

    def _depths(self) -> list[int]:
        """Return the number of hidden layers between the inputs and each hidden set."""
        depth = [-1 if found.role == "input" else 0 for found in self.sets]
        # Kernels are in the order of the computation; recurrent ones are ignored.
        for k in self.kernels:
            if k.source != k.target:
                is_layer = max(k.grid[1:]) > 1 and k.parameter < len(self.shapes)
                depth[k.target] = max(depth[k.target], depth[k.source] + int(is_layer))
        return [
            max(d, 0) if f.role == "hidden" else 0 for d, f in zip(depth, self.sets, strict=True)
        ]


def _overlap(one: Kernel | Bias, other: Kernel | Bias) -> bool:
    """Return whether two uses of parameters share scalars."""
    return (
        one.parameter == other.parameter
        and one.start < other.start + other.size
        and other.start < one.start + one.size
    )


def sides(use: Kernel | Bias) -> list[tuple[int, int, int]]:
    """Return the neurons of rows and columns of a kernel, or of a bias: (set, first, number)."""
    if isinstance(use, Bias):
        return [(use.neurons, use.neurons_start, use.size)]
    groups, rows, columns = use.grid
    read, written = (use.source, use.source_start), (use.target, use.target_start)
    of_rows, of_columns = (read, written) if use.from_rows else (written, read)
    return [(*of_rows, groups * rows), (*of_columns, groups * columns)]


def _is_contiguous(factors: Axis) -> bool:
    """Return whether factors are adjacent neurons of a set, with only data inside of them."""
    first, *inside = factors
    return first.set is not None and first.stride == 1 and all(f.set is None for f in inside)


def _grids(
    large: Sequence[Factor], small: Sequence[Factor], large_start: int, small_start: int
) -> list[tuple[int, int, int, int]]:
    """Return grids (groups, rows, first of large, first of small) that connect them elementwise."""
    runs: list[list[int]] = []  # (size, stride in large, stride in small), merged where possible
    for a, b in zip(large, small, strict=True):
        if a.size == 1:
            continue
        if runs and runs[-1][1] == a.stride * a.size and runs[-1][2] == b.stride * b.size:
            runs[-1] = [runs[-1][0] * a.size, a.stride, b.stride]
        else:
            runs.append([a.size, a.stride, b.stride])
    if not runs:
        return [(1, 1, large_start, small_start)]
    if len(runs) == 1 and runs[0][1:] == [1, 1]:
        return [(runs[0][0], 1, large_start, small_start)]
    if len(runs) == 1 and runs[0][1:] == [1, 0]:
        return [(1, runs[0][0], large_start, small_start)]
    if len(runs) == 2 and runs[0][1:] == [runs[1][0], 1] and runs[1][1:] == [1, 0]:
        return [(runs[0][0], runs[1][0], large_start, small_start)]
    (size, of_large, of_small), *rest = runs
    inner_large = [Factor(n, 0, s) for n, s, _ in rest]
    inner_small = [Factor(n, 0, s) for n, _, s in rest]
    require(size <= MOST_GRIDS)
    answer: list[tuple[int, int, int, int]] = []
    for i in range(size):
        answer += _grids(
            inner_large, inner_small, large_start + i * of_large, small_start + i * of_small
        )
        require(len(answer) <= MOST_GRIDS)
    return answer


def row_major(sizes: Sequence[int], set: int) -> list[Factor]:
    """Return factors of these sizes that enumerate a set, the last one fastest."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return [Factor(n, set, s) for n, s in zip(sizes, strides, strict=True)]
