"""What parameters do to neurons: maps, biases, factors and tables."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from l2o_graph.layout.spec import Bias, Kernel
from l2o_graph.tracing.builder import Weight, numbered
from l2o_graph.tracing.labels import (
    Axis,
    Factor,
    Label,
    data,
    joined,
    refined,
    sole_factor,
    told_apart,
)
from l2o_graph.tracing.meetings import Meetings

# A layer that maps more parts of a set alike than this is not followed.
MOST_PARTS = 64


class Layers(Meetings):
    """Parameters that join neurons, and those that sit on them."""

    def dense(
        self, x: Tensor, axis: int, weight: Tensor, transposed: bool = False, groups: int = 1,
        kind: str = "dense",
    ) -> Label | None:  # fmt: skip
        """A parameter that maps the neurons along an axis of a tensor to new ones.

        It is [out, in, *positions], or with ``transposed`` [in, out, *positions]; ``groups`` are
        those of a convolution. The label has the new neurons along that axis; None where it cannot
        be followed.
        """
        weights = self.weights(weight)
        if not weights:
            return None
        first, *others = weights
        shape = tuple(weight.shape)
        out = shape[1] * groups if transposed else shape[0]
        if not first.dense and len(shape) == 2:  # the transpose of what the parameter stores
            first, transposed = first.transposed(), not transposed
            others = [other.transposed() for other in others]
        name = self.name(weights)
        known = self.builder.read(self.started(x, axis, name), axis, name)
        if known is None or not first.dense or (known[4] and (transposed or groups > 1)):
            return None
        if sole_factor(known[0], axis) is None and not known[4]:
            alone = groups == 1 and not others and not first.fixed
            return self._dense_in_parts(known[0], axis, first, transposed) if alone else None
        label, source, start, count, inside = known
        if not self.is_even(x):
            self.set_label(x, label)
        target = self.builder.new_set(name, out)
        rows = first.shape[0] // groups
        if inside:  # a flattened map: of each channel all pixels lie together
            grid, positions = (1, rows, count), (*(f.size for f in inside), *first.shape[2:])
        else:
            grid, positions = (groups, rows, first.shape[1]), first.shape[2:]
        kernel = Kernel(
            first.parameter, source, target, grid, positions, first.start, start,
            from_rows=transposed, kind=kind,
        )  # fmt: skip
        self.builder.add_kernel(kernel)
        for other in others:
            self._made_of_too(kernel, first, other)
        if first.fixed:
            self.builder.fix(source)
            self.builder.fix(target)
        return label.with_axis(axis, (Factor(out, target, 1),)).only()

    def started(self, x: Tensor, axis: int, name: str) -> Label:
        """The label of a tensor that a parameter reads along an axis.

        Entries that are one number, as the first state of a recurrent network is, are neurons that
        nothing tells apart, beside inputs or alone.
        """
        label, axis = self.label(x), axis % x.dim()
        size = x.shape[axis]
        pieces = {axis: [(size, True)]} if self.is_even(x) else self.pieces.get(x)
        if label.sets() or size == 1 or pieces is None or axis not in pieces:
            return label
        target, at = self.builder.new_meeting("start", size), 0
        for n, blank in pieces[axis]:
            if not blank:
                own = Factor(n, self.builder.ordered(f"input of {name}", n), 1)
                self.builder.connect([Factor(n, target, 1)], [own], (at, 0), True, "start")
            at += n
        return label.with_axis(axis, (Factor(size, target, 1),))

    def dense_folded(self, x: Tensor, tensor: Tensor) -> Label | None:
        """A folded parameter, [..., in, out], that maps the last axis of a tensor to a new one.

        As einsum has them: the entries of all heads, or the neurons of all experts, in one axis.
        """
        found = self.folded.get(tensor)
        if found is None or found[0].fixed:
            return None
        weight, (*_, read, written) = found
        steps, name, label = weight.steps, self.name([weight]), self.label(x)
        last = len(label.axes) - 1
        both = refined(label.axes[last], tuple(Factor(steps[i][0]) for i in read))
        if both is None or len(both[0]) != len(read):
            return None
        # As the parameter stores them, the outermost first.
        order = sorted(range(len(read)), key=lambda i: -steps[read[i]][1])
        new = sorted(written, key=lambda i: -steps[i][1])
        *rows_outside, rows = _runs([steps[read[i]] for i in order])
        *columns_outside, columns = _runs([steps[i] for i in new])
        from_rows = columns.stride == 1 and rows.stride == columns.size
        if not (from_rows or (rows.stride == 1 and columns.stride == rows.size)):
            return None
        if math.prod(f.size for f in (*rows_outside, *columns_outside)) > MOST_PARTS:
            return None
        stored = label.with_axis(last, joined([both[0][i] for i in order]))
        known = self.builder.read(stored, last, name)
        if known is None or known[4] or sole_factor(known[0], last) is None:
            return None
        stored, source, start, _, _ = known
        if all(f.set is None for f in label.axes[last]):  # which are inputs from now on
            there = numbered([steps[read[i]][0] for i in order], source)
            back = joined([there[order.index(i)] for i in range(len(order))])
            self.set_label(x, label.with_axis(last, back))
        target = self.builder.new_set(name, math.prod(steps[i][0] for i in written))
        inner = (rows.size, columns.size) if from_rows else (columns.size, rows.size)
        for (i, row), (j, column) in itertools.product(
            enumerate(_starts(rows_outside)), enumerate(_starts(columns_outside))
        ):
            self.builder.add_kernel(
                Kernel(
                    weight.parameter, source, target, (1, *inner), (), weight.start + row + column,
                    start + i * rows.size, j * columns.size, from_rows=from_rows,
                )
            )  # fmt: skip
        made = dict(zip(new, numbered([steps[i][0] for i in new], target), strict=True))
        return stored.with_axis(last, joined([made[i] for i in written])).only()

    def _made_of_too(self, kernel: Kernel, weight: Weight, other: Weight) -> None:
        """Another parameter, of one shape, that the weight of a kernel was made of entry by entry.

        One that has as many entries is a kernel beside it, the lengths of rows or columns, as in
        weight normalisation, sit on the neurons; neurons that it tells apart otherwise keep their
        order.
        """
        wide = [i for i, (n, step) in enumerate(other.steps) if n > 1 and step]
        read, written = (kernel.source, kernel.source_start), (kernel.target, kernel.target_start)
        rows, columns = (read, written) if kernel.from_rows else (written, read)
        sides = [(*rows, kernel.grid[0] * kernel.grid[1])]
        if kernel.grid[0] == 1:
            sides.append((*columns, kernel.grid[2]))
        if not other.fixed and other.steps == weight.steps:
            self.builder.add_kernel(replace(kernel, parameter=other.parameter, start=other.start))
        elif not other.fixed and len(wide) == 1 and wide[0] < len(sides):
            s, at, n = sides[wide[0]]
            if other.shape[wide[0]] == n and other.strides[wide[0]] == 1:
                self.builder.add_bias(Bias(other.parameter, s, n, other.start, at))
            else:
                self.builder.fix(s)
        elif any(i < 2 for i in wide):
            self.builder.fix(kernel.source)
            self.builder.fix(kernel.target)

    def _dense_in_parts(
        self, label: Label, axis: int, weight: Weight, transposed: bool
    ) -> Label | None:
        """A parameter that maps the neurons of each part of a set, as of each head, alike."""
        axis %= len(label.axes)
        (inner,) = label.axes[axis]
        assert inner.set is not None
        outer = [f for i, a in enumerate(label.axes) for f in a if i != axis and f.set == inner.set]
        parts, name = math.prod(f.size for f in outer), self.name([weight])
        if parts > MOST_PARTS or inner.stride != 1:
            return None
        rows, columns = weight.shape[0], weight.shape[1]
        out = columns if transposed else rows
        target = self.builder.new_set(name, parts * out)
        start = label.start.get(inner.set, 0)
        for i, at in enumerate(_starts(outer)):
            self.builder.add_kernel(
                Kernel(
                    weight.parameter, inner.set, target, (1, rows, columns), weight.shape[2:],
                    weight.start, start + at, i * out, from_rows=transposed,
                )
            )  # fmt: skip
        *numbers, last = numbered([*(f.size for f in outer), out], target)
        there = iter(numbers)
        axes = [
            (last,) if i == axis else tuple(next(there) if f.set == inner.set else f for f in a)
            for i, a in enumerate(label.axes)
        ]
        return Label(tuple(axes), label.start).only()

    def bias(self, label: Label | None, axis: int, tensor: Tensor | None) -> Label | None:
        """Something that is added to the neurons along an axis, a parameter most of the time."""
        if label is None or tensor is None:
            return label
        if self.weights(tensor):
            return self.added(label, tensor, axis=axis)
        if not self.is_even(tensor):
            self.builder.lose(f.set for f in label.axes[axis])
        return label

    def scale(
        self, label: Label, axis: int, tensor: Tensor | None, kind: str = "norm"
    ) -> Label | None:
        """Something that multiplies the neurons along an axis; without it they stay."""
        weights = self.weights(tensor)
        if not weights:
            if tensor is not None and not self.is_even(tensor):
                self.builder.lose(f.set for f in label.axes[axis])
            return label
        neurons = any(f.set is not None for f in label.axes[axis])
        if (neurons and sole_factor(label, axis) is None) or not weights[0].dense:
            return self._all_own(label, weights, axis)
        known = self.builder.read(label, axis, self.name(weights))
        if known is None:
            return None
        label, source, start, count, inside = known
        if inside or math.prod(weights[0].shape) != count:
            return self._all_own(label, weights, axis)
        target = self.builder.new_set(self.name(weights), count)
        for other in weights:
            if other.dense and math.prod(other.shape) == count:
                grid = (count, 1, 1)
                self.builder.add_kernel(
                    Kernel(other.parameter, source, target, grid, (), other.start, start, kind=kind)
                )
            elif any(step for n, step in other.steps if n > 1):
                self.builder.fix(target)
        if any(weight.fixed for weight in weights):
            self.builder.fix(target)
        return label.with_axis(axis, (Factor(count, target, 1),)).only()

    def added(
        self, label: Label | None, tensor: Tensor, kind: str = "sum", axis: int = -1
    ) -> Label | None:
        """A parameter that is added to a tensor with a label, its last axis along ``axis`` of it.

        ``kind`` is "sum", or "product" where it multiplies. Where it has no place the neurons that
        it tells apart keep their order.
        """
        for weight in self.weights(tensor):
            if label is None:
                break
            last = axis if axis < 0 else axis - len(label.axes)
            wide = [  # from the last: (axis of the label, size, stride)
                (i + 1 - len(weight.shape) + last, n, stride)
                for i, (n, stride) in enumerate(weight.steps)
                if n > 1 and (stride or weight.fixed)  # fixed numbers may differ along it
            ]
            along = [at for at, _, _ in wide if -at <= len(label.axes)]
            if kind == "sum" and self._placed(label, weight, wide, last):
                label = told_apart(label, along)
            else:
                label = self._own(label, weight, along, kind)
        return label

    def _placed(
        self, label: Label, weight: Weight, wide: Sequence[tuple[int, int, int]], last: int
    ) -> bool:
        """Whether a parameter that is added finds its place as a bias or as rows of a table.

        ``wide`` are its axes that are longer than 1: axis of the label, size, stride.
        """
        of_neurons = [
            (axis, n, stride)
            for axis, n, stride in wide
            if -axis <= len(label.axes) and any(f.set is not None for f in label.axes[axis])
        ]
        if not wide:
            if label.shape[last] != 1:  # a single number has no place, and tells nothing apart
                return True
            of_neurons = [(last, 1, 1)]  # a single number on a single neuron
        if not of_neurons and wide:  # it tells no neurons apart
            return True
        if len(of_neurons) != 1:
            return False
        ((axis, size, stride),) = of_neurons
        factor = sole_factor(label, axis)
        if factor is None or factor.set is None or factor.stride != 1 or factor.size != size:
            return not wide
        at, others = label.start.get(factor.set, 0), math.prod(n for _, n, _ in wide) // size
        if not wide or (others == 1 and stride == 1):
            self.builder.add_bias(Bias(weight.parameter, factor.set, size, weight.start, at))
            if weight.fixed:
                self.builder.fix(factor.set)
            return True
        if weight.fixed:
            return False
        name = self.builder.names[weight.parameter]
        positions = tuple(n for a, n, _ in wide if a > axis)
        if stride == 1:  # [places, neurons]
            grid, from_rows, positions, places = (1, others, size), True, (), others
        elif stride == math.prod(positions) == others:  # [neurons, *positions]
            grid, from_rows, places = (1, size, 1), False, 1
        else:
            return False
        source = self.builder.ordered(f"places of {name}", places)
        self.builder.add_kernel(
            Kernel(
                weight.parameter, source, factor.set, grid, positions, weight.start,
                target_start=at, from_rows=from_rows, kind="lookup",
            )
        )  # fmt: skip
        return True

    def _all_own(self, label: Label, weights: Sequence[Weight], axis: int) -> Label | None:
        """Parameters that multiply a tensor along an axis, as neurons of their own."""
        answer: Label | None = label
        for weight in weights:
            answer = answer and self._own(answer, weight, [axis], "product")
        return answer

    def _own(self, label: Label, weight: Weight, axes: Sequence[int], kind: str) -> Label | None:
        """A parameter that meets a tensor as neurons of its own, one for each of its scalars.

        So it is where a scalar serves several neurons, as those of a norm that all heads share.
        ``axes`` are those of the label, one for each axis of the parameter longer than 1.
        """
        sizes = [n for n, step in weight.steps if n > 1 and step]
        ends = [axis % len(label.axes) for axis in axes]
        whole = all(label.shape[at] == n for at, n in zip(ends, sizes, strict=False))
        of_neurons = [f.set is not None or f.alike for at in ends for f in label.axes[at]]
        known = all(of_neurons) and any(f.set is not None for at in ends for f in label.axes[at])
        if len(sizes) != len(ends) or not whole or not known or weight.fixed or not weight.solid:
            self.builder.lose(f.set for at in ends for f in label.axes[at])
            return told_apart(label, ends)
        size = math.prod(sizes)
        own = self.builder.new_set(self.builder.names[weight.parameter], size)
        self.builder.add_bias(Bias(weight.parameter, own, size, weight.start))
        mine: list[Axis] = [()] * len(label.axes)
        for at, factor in zip(ends, numbered(sizes, own), strict=True):
            mine[at] = (factor,)
        return self.combine(label, Label(tuple(mine)), label.shape, kind, alike=kind == "sum")

    def lookup(self, index: Tensor, table: Tensor) -> Label | None:
        """Rows of a table, picked by an index: each row is an input of its own."""
        weights = self.weights(table)
        if not weights or not weights[0].dense:
            return None
        (first, *others), name = weights, self.name(weights)
        rows, columns = first.shape
        source = self.builder.ordered(f"rows of {name}", rows)
        target = self.builder.new_set(name, columns)
        kernel = Kernel(
            first.parameter, source, target, (1, rows, columns), (), first.start, from_rows=True,
            kind="lookup",
        )  # fmt: skip
        self.builder.add_kernel(kernel)
        for other in others:
            self._made_of_too(kernel, first, other)
        if first.fixed:
            self.builder.fix(target)
        return Label((*data(index.shape).axes, (Factor(columns, target, 1),)))


def _runs(steps: Sequence[tuple[int, int]]) -> Axis:
    """Axes (size, stride) of a parameter, outermost first, in as few factors as possible."""
    return joined([Factor(n, 0, stride) for n, stride in steps if n > 1]) or (Factor(1, 0, 1),)


def _starts(factors: Sequence[Factor]) -> list[int]:
    """Where each of all steps through factors begins, the last one fastest."""
    steps = itertools.product(*(range(f.size) for f in factors))
    return [sum(n * f.stride for n, f in zip(at, factors, strict=True)) for at in steps]
