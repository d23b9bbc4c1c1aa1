"""Construction of a network's graph during tracing: sets of neurons, kernels and biases."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from l2o_graph.layout.spec import Bias, Kernel, NetSpec, Neurons, Role
from l2o_graph.tracing.labels import Axis, Factor, Label

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

    # Neurons -----------------------------------------------------------------------------------

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

    def read_axis(
        self, label: Label, axis: int, name: str
    ) -> tuple[Label, int, int, int, Axis] | None:
        """Read the neurons along an axis as one contiguous range of a set.

        Data becomes a set of inputs, and neurons in another order are connected to a new set.

        Args:
            label: Label of a tensor.
            axis: Axis that a layer reads.
            name: Name of the layer.

        Returns:
            The label with such sets; the set; its first neuron; the number of neurons; and factors
            of data inside of each neuron. None if the neurons are not of this form.
        """
        factors = label.axes[axis]
        if all(f.set is None for f in factors):
            size = math.prod(f.size for f in factors)
            own = Factor(size, self.new_inputs(f"input of {name}", size), 1)
            label = label.with_axis(axis, (own,))
        elif not _is_contiguous(factors):
            target = self.new_merge("rearranged", math.prod(f.size for f in factors))
            large = row_major([f.size for f in factors], target)
            if not self.copy(label, factors, large, 0, "rearranged"):
                return None
            label = label.with_axis(axis, (Factor(self.sets[target].size, target, 1),)).pruned()
        first, *inside = label.axes[axis]
        assert first.set is not None
        self.mark_read(first.set)
        return label, first.set, label.start.get(first.set, 0), first.size, tuple(inside)

    def mark_read(self, *sets: int) -> None:
        """Record that sets are read."""
        for s in sets:
            self.sets[s].fresh = False
            self.recent_reads.add(s)

    # Kernels and biases ---------------------------------------------------------------------------

    def add_kernel(self, kernel: Kernel) -> None:
        """Add a kernel."""
        self.kernels.append(replace(kernel, again=self._held(kernel)))
        self.placed.append(kernel.parameter)

    def add_bias(self, bias: Bias) -> None:
        """Add a bias."""
        self.biases.append(replace(bias, again=self._held(bias)))
        self.placed.append(bias.parameter)

    def _held(self, new: Kernel | Bias) -> bool:
        """Return whether another kernel or bias owns any of its scalars."""
        return any(
            k.parameter == new.parameter
            and k.start < new.start + new.size
            and new.start < k.start + k.size
            for k in (*self.kernels, *self.biases)
            if not k.again
        )

    def connect(
        self, large: Sequence[Factor], small: Sequence[Factor], starts: tuple[int, int],
        large_reads: bool, kind: str, constant: int = 0,
    ) -> bool:  # fmt: skip
        """Connect two sets elementwise by edges of a constant.

        Args:
            large: Factors that enumerate the neurons of the larger set, outermost first.
            small: Factors of the same sizes for the smaller set, with stride 0 where several
                neurons of the larger set share one of the smaller.
            starts: First neuron of each.
            large_reads: Whether edges lead to the larger set, not from it.
            kind: Kind of operation.
            constant: Index into the ``CONSTANTS``.

        Returns:
            Whether the number of kernels was small enough; otherwise, nothing was added.
        """
        grids = _grids(large, small, *starts)
        if grids is None:
            return False
        of_large, of_small = large[0].set, next((f.set for f in small if f.set is not None), None)
        if of_large is None or of_small is None:
            return False
        self.mark_read(of_small, of_large)
        for groups, rows, large_start, small_start in grids:
            source, target = (of_small, of_large) if large_reads else (of_large, of_small)
            at = (small_start, large_start) if large_reads else (large_start, small_start)
            index = len(self.shapes) + constant
            self.add_kernel(
                Kernel(
                    index, source, target, (groups, rows, 1), source_start=at[0],
                    target_start=at[1], from_rows=not large_reads, kind=kind,
                )
            )  # fmt: skip
        return True

    def copy(
        self, label: Label, factors: Sequence[Factor], large: Sequence[Factor], at: int, kind: str
    ) -> bool:  # fmt: skip
        """Connect everything that factors of a label enumerate to the neurons of a set, one to one.

        Varying data among the factors is connected as places, one input per step.

        Args:
            label: Label of the tensor.
            factors: Factors of its axes.
            large: Factors of the same sizes of the set.
            at: First neuron of the set.
            kind: Kind of operation.

        Returns:
            Whether all could be connected.
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
                small = [f if f.set == s else Factor(f.size) for f in factors]
                start = label.start.get(s, 0)
            if not self.connect(large, small, (at, start), True, kind):
                return False
        for s in {f.set for f in large if f.set is not None}:
            self.sets[s].fresh = True
        return True

    def is_connected(self, source: int, target: int) -> bool:
        """Return whether a constant connects one set to another."""
        return any(
            k.source == source and k.target == target and k.parameter >= len(self.shapes)
            for k in self.kernels
        )

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

    # Tied parameters -----------------------------------------------------------

    def _tie(self) -> None:
        """Connect the neurons of all uses of a parameter, which can only be permuted together."""
        uses = [k for k in (*self.kernels, *self.biases) if k.parameter < len(self.shapes)]
        held: dict[int, list[Kernel | Bias]] = {}
        for one in uses:
            if not one.again:
                held.setdefault(one.parameter, []).append(one)
        for one in uses:
            for first in held[one.parameter] if one.again else ():
                if first.start < one.start + one.size and one.start < first.start + first.size:
                    self._tie_pair(first, one)
                    break

    def _tie_pair(self, first: Kernel | Bias, again: Kernel | Bias) -> None:
        ours, theirs = _sides(first), _sides(again)
        same_layout = (first.start, [n for *_, n in ours]) == (again.start, [n for *_, n in theirs])
        if not same_layout:  # layouts differ: no common permutation is known
            for s, *_ in (*ours, *theirs):
                if self.sets[s].role == "hidden":
                    self.sets[s].role = "output"
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

    # Specification -----------------------------------------------------------------------------

    def spec(self, outputs: Sequence[int]) -> NetSpec:
        """Return the specification; without ``outputs``, sets that no kernel reads are outputs."""
        read = {k.source for k in self.kernels if k.source != k.target}
        last = set(outputs) or set(range(len(self.sets))) - read
        for n in last | {n for n, found in enumerate(self.sets) if found.is_ordered}:
            if self.sets[n].role == "hidden":
                self.sets[n].role = "output"
        self._tie()
        for use in (*self.kernels, *self.biases):
            for s, *_ in _sides(use) if use.parameter in self.exposed else ():
                if self.sets[s].role == "hidden":
                    self.sets[s].role = "output"
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

    def _complete_tables(self) -> None:
        """Extend kernels of tables to rows that were not used."""
        uses: dict[int, list[int | None]] = {}
        for i, k in enumerate(self.kernels):
            uses.setdefault(k.parameter, []).append(i if k.kind == "lookup" else None)
        for b in self.biases:
            uses.setdefault(b.parameter, []).append(None)
        for parameter, (i, *others) in uses.items():
            if i is None or others:
                continue
            table, total = self.kernels[i], math.prod(self.shapes[parameter])
            width = table.grid[2]
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
                deeper = int(k.grid[0] < max(k.grid[0] * k.grid[1], k.grid[0] * k.grid[2]))
                deeper = deeper if k.parameter < len(self.shapes) else 0
                depth[k.target] = max(depth[k.target], depth[k.source] + deeper)
        return [
            max(d, 0) if f.role == "hidden" else 0 for d, f in zip(depth, self.sets, strict=True)
        ]


def _sides(use: Kernel | Bias) -> list[tuple[int, int, int]]:
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
) -> list[tuple[int, int, int, int]] | None:
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
    if size > MOST_GRIDS:
        return None
    answer: list[tuple[int, int, int, int]] = []
    for i in range(size):
        part = _grids(
            inner_large, inner_small, large_start + i * of_large, small_start + i * of_small
        )
        if part is None or len(answer) + len(part) > MOST_GRIDS:
            return None
        answer += part
    return answer


def row_major(sizes: Sequence[int], set: int) -> list[Factor]:
    """Return factors of these sizes that enumerate a set, the last one fastest."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return [Factor(n, set, s) for n, s in zip(sizes, strides, strict=True)]
