"""Sets of neurons and what joins them, put together while a network computes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from l2o_graph.layout.spec import Bias, Kernel, NetSpec, Neurons, Role
from l2o_graph.tracing.labels import Axis, Factor, Label

# A rearrangement that takes more grids than this is not followed.
MOST_GRIDS = 4096


@dataclass(slots=True)
class NodeSet:
    """A set of neurons so far."""

    name: str
    size: int
    role: Role
    fresh: bool = True  # nothing has read it yet, nor an activation changed it
    activation: str = ""
    lost: bool = False  # something that cannot be followed reads it, and may know its order


@dataclass(frozen=True, slots=True)
class Weight:
    """A view of parameter number ``parameter``: its first scalar, shape, and strides in scalars.

    ``fixed`` is whether fixed numbers, as those of a mask, tell the neurons on both sides apart.
    """

    parameter: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    fixed: bool = False

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """Size and stride of each axis."""
        return tuple(zip(self.shape, self.strides, strict=True))

    @property
    def dense(self) -> bool:
        """Whether the scalars lie together, in the order of the axes."""
        expected = 1
        for size, stride in reversed(self.steps):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def solid(self) -> bool:
        """Whether it is dense but for axes along which its scalars repeat."""
        kept = [(n, step) for n, step in self.steps if step]
        shape, strides = tuple(n for n, _ in kept), tuple(step for _, step in kept)
        return replace(self, shape=shape, strides=strides).dense

    def broadcast(self, shape: Sequence[int], axis: int | None = None) -> "Weight | None":
        """The same in a new shape, its scalars repeated; None where the shapes do not fit.

        ``axis`` is which axis of it the only one of the weight is; None to align the last ones.
        """
        before = len(shape) - len(self.shape) if axis is None else axis
        behind = len(shape) - len(self.shape) - before
        if before < 0 or behind < 0:
            return None
        own = (*(1,) * before, *self.shape, *(1,) * behind)
        steps = (*(0,) * before, *self.strides, *(0,) * behind)
        if any(n not in (1, m) for n, m in zip(own, shape, strict=True)):
            return None
        strides = tuple(
            0 if n == 1 < m else step for n, m, step in zip(own, shape, steps, strict=True)
        )
        return replace(self, shape=tuple(shape), strides=strides)

    def transposed(self, i: int = 0, j: int = 1) -> "Weight":
        """With two axes exchanged."""
        order = list(range(len(self.shape)))
        order[i], order[j] = j, i
        shape, strides = (tuple(each[n] for n in order) for each in (self.shape, self.strides))
        return replace(self, shape=shape, strides=strides)


class Builder:
    """Collects neurons, kernels and biases, of parameters with these names and shapes."""

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]):
        self.names, self.shapes = list(names), list(shapes)
        self.sets: list[NodeSet] = []
        self.kernels: list[Kernel] = []
        self.biases: list[Bias] = []
        self.placed: list[int] = []  # the parameters of these, in the order of the computation
        self.touched: set[int] = set()  # read since someone last looked
        self.known: set[int] = set()  # parameters of which something else may know the order
        self._meetings = 0

    # Neurons -----------------------------------------------------------------------------------

    def new_set(self, name: str, size: int, role: Role = "hidden") -> int:
        """A set of neurons; returns its index."""
        self.sets.append(NodeSet(name, size, role))
        return len(self.sets) - 1

    def new_meeting(self, kind: str, size: int) -> int:
        """A set of neurons that others are joined to by the constant 1; returns its index."""
        self._meetings += 1
        return self.new_set(f"{kind} {self._meetings}", size)

    def ordered(self, name: str, size: int) -> int:
        """Neurons that are each themselves, as inputs are: pixels, positions, words."""
        return self.new_set(name, size, "input")

    def read(self, label: Label, axis: int, name: str) -> tuple[Label, int, int, int, Axis] | None:
        """The neurons along an axis: (label, set, first, how many, data factors inside).

        Data alone becomes a set of inputs, and neurons in an order of their own a new set, either
        of which the label that is returned knows. None where that cannot be done.
        """
        factors = label.axes[axis]
        if all(f.set is None for f in factors):
            size = math.prod(f.size for f in factors)
            own = Factor(size, self.ordered(f"input of {name}", size), 1)
            label = label.with_axis(axis, (own,))
        elif not _is_run(factors):
            target = self.new_meeting("rearranged", math.prod(f.size for f in factors))
            large = numbered([f.size for f in factors], target)
            if not self.copy(label, factors, large, 0, "rearranged"):
                return None
            label = label.with_axis(axis, (Factor(self.sets[target].size, target, 1),)).only()
        first, *inside = label.axes[axis]
        assert first.set is not None
        self.mark_read(first.set)
        return label, first.set, label.start.get(first.set, 0), first.size, tuple(inside)

    def mark_read(self, *sets: int) -> None:
        """Note that sets are read."""
        for s in sets:
            self.sets[s].fresh = False
            self.touched.add(s)

    # What joins them ---------------------------------------------------------------------------

    def add_kernel(self, kernel: Kernel) -> None:
        """Add a kernel."""
        self.kernels.append(replace(kernel, again=self._held(kernel)))
        self.placed.append(kernel.parameter)

    def add_bias(self, bias: Bias) -> None:
        """Add a bias."""
        self.biases.append(replace(bias, again=self._held(bias)))
        self.placed.append(bias.parameter)

    def _held(self, new: Kernel | Bias) -> bool:
        """Whether any of its scalars are held already."""
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
        """Join two sets by a constant, entry by entry; returns whether it could be done.

        ``large`` are factors that run through every neuron of one set, outermost first, ``small``
        factors of the same sizes that run through the other, with a stride of 0 where it has one
        neuron for all steps; ``starts`` the first neuron of each, ``constant`` which of the
        ``CONSTANTS`` edges carry. They lead to the large set, or else, from it.
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
        """Join what factors of a label run through to neurons of a set, one by one, where possible.

        Where data lies outside of the neurons each of its places is one of its own. ``large`` are
        factors of the same sizes that run through the set, from its neuron ``at`` on.
        """
        for s in dict.fromkeys(f.set for f in factors if not f.alike):
            if s is None:
                sizes = [f.size for f in factors if f.set is None and not f.alike]
                place = iter(numbered(sizes, self.ordered("places", math.prod(sizes))))
                small = [
                    next(place) if f.set is None and not f.alike else Factor(f.size)
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

    def is_joined(self, source: int, target: int) -> bool:
        """Whether a constant leads from a set to another."""
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
                source = self.ordered(f"rows of {self.names[i]}", rows)
                target = self.new_set(self.names[i], columns)
                self.add_kernel(
                    Kernel(i, source, target, (1, rows, columns), from_rows=True, kind="lookup")
                )

    def lose(self, sets: Iterable[int | None]) -> None:
        """Note that something that cannot be followed reads sets, and may know their order."""
        for s in sets:
            if s is not None:
                self.sets[s].lost = True

    def fix(self, s: int) -> None:
        """Join each neuron of a set to a place of its own: fixed numbers tell their order."""
        size = self.sets[s].size
        own = self.ordered("places", size)
        self.add_kernel(Kernel(len(self.shapes), own, s, (size, 1, 1), kind="places"))

    # One parameter in several places -----------------------------------------------------------

    def _tie(self) -> None:
        """Join the neurons of all uses of a parameter: they can only be permuted together."""
        uses = [k for k in (*self.kernels, *self.biases) if k.parameter < len(self.shapes)]
        held: dict[int, list[Kernel | Bias]] = {}
        for one in uses:
            if not one.again:
                held.setdefault(one.parameter, []).append(one)
        for one in uses:
            for first in held[one.parameter] if one.again else ():
                if first.start < one.start + one.size and one.start < first.start + first.size:
                    self._tie_two(first, one)
                    break

    def _tie_two(self, first: Kernel | Bias, again: Kernel | Bias) -> None:
        ours, theirs = _sides(first), _sides(again)
        alike = (first.start, [n for *_, n in ours]) == (again.start, [n for *_, n in theirs])
        if not alike:  # scalars that lie otherwise in each use: no permutation is known to fit
            for s, *_ in (*ours, *theirs):
                if self.sets[s].role == "hidden":
                    self.sets[s].role = "output"
            return
        for (s, at, n), (t, there, _) in zip(ours, theirs, strict=True):
            ordered = self.sets[s].role != "hidden" and self.sets[t].role != "hidden"
            if not ordered and not self._move_together(s, at, t, there, n):
                self.add_kernel(
                    Kernel(
                        len(self.shapes), s, t, (n, 1, 1), source_start=at, target_start=there,
                        kind="tied",
                    )
                )  # fmt: skip

    def _move_together(self, s: int, at: int, t: int, there: int, n: int) -> bool:
        """Whether edges from one neuron to one lead from a run of a set to a run of another."""
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

    # The end -----------------------------------------------------------------------------------

    def spec(self, outputs: Sequence[int]) -> NetSpec:
        """What was found, of a network that returns sets; without any, those that nothing reads."""
        read = {k.source for k in self.kernels if k.source != k.target}
        last = set(outputs) or set(range(len(self.sets))) - read
        for n in last | {n for n, found in enumerate(self.sets) if found.lost}:
            if self.sets[n].role == "hidden":
                self.sets[n].role = "output"
        self._tie()
        for use in (*self.kernels, *self.biases):
            for s, *_ in _sides(use) if use.parameter in self.known else ():
                if self.sets[s].role == "hidden":
                    self.sets[s].role = "output"
        self._complete_tables()
        kernels, biases, loose = self._answered()
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
        """Give tables of which some rows were used all of their rows."""
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

    def _answered(self) -> tuple[list[Kernel], list[Bias], list[int]]:
        """Kernels and biases, and the parameters that they do not hold as a whole."""
        held = [0] * len(self.shapes)
        for k in (*self.kernels, *self.biases):
            if not k.again and k.parameter < len(held):
                held[k.parameter] += k.size
        loose = {i for i, shape in enumerate(self.shapes) if held[i] != math.prod(shape)}
        kernels = [replace(k, again=True) if k.parameter in loose else k for k in self.kernels]
        biases = [replace(b, again=True) if b.parameter in loose else b for b in self.biases]
        return kernels, biases, sorted(loose)

    def _depths(self) -> list[int]:
        """Hidden layers from the inputs to each hidden set, the set itself not counted."""
        depth = [-1 if found.role == "input" else 0 for found in self.sets]
        # Kernels come in the order of the computation; those that lead back say nothing.
        for k in self.kernels:
            if k.source != k.target:
                deeper = int(k.grid[0] < max(k.grid[0] * k.grid[1], k.grid[0] * k.grid[2]))
                deeper = deeper if k.parameter < len(self.shapes) else 0
                depth[k.target] = max(depth[k.target], depth[k.source] + deeper)
        return [
            max(d, 0) if f.role == "hidden" else 0 for d, f in zip(depth, self.sets, strict=True)
        ]


def _sides(use: Kernel | Bias) -> list[tuple[int, int, int]]:
    """What the rows and the columns of a kernel are, or the entries of a bias: (set, first, n)."""
    if isinstance(use, Bias):
        return [(use.neurons, use.neurons_start, use.size)]
    groups, rows, columns = use.grid
    read, written = (use.source, use.source_start), (use.target, use.target_start)
    of_rows, of_columns = (read, written) if use.from_rows else (written, read)
    return [(*of_rows, groups * rows), (*of_columns, groups * columns)]


def _is_run(factors: Axis) -> bool:
    """Neurons one after the other, and only data inside them."""
    first, *inside = factors
    return first.set is not None and first.stride == 1 and all(f.set is None for f in inside)


def _grids(
    large: Sequence[Factor], small: Sequence[Factor], large_start: int, small_start: int
) -> list[tuple[int, int, int, int]] | None:
    """Grids (groups, rows, first of large, first of small) that join them step by step."""
    runs: list[list[int]] = []  # [size, stride in large, stride in small], as few as possible
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


def numbered(sizes: Sequence[int], set: int) -> list[Factor]:
    """Factors of these sizes that run through all of a set, the last one fastest."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return [Factor(n, set, s) for n, s in zip(sizes, strides, strict=True)]
