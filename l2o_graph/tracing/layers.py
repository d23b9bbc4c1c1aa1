"""Operations on neurons with parameters: kernels, biases, scales and tables."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from l2o_graph.layout.spec import Bias, Kernel
from l2o_graph.tracing.builder import row_major
from l2o_graph.tracing.labels import (
    Axis,
    Factor,
    Label,
    NotFollowed,
    as_varying,
    coalesced,
    data,
    refined,
    require,
    sole_factor,
)
from l2o_graph.tracing.merging import Merging
from l2o_graph.tracing.weight import Weight

# Largest number of parts of a set that share a kernel; layers with more are not followed.
MOST_PARTS = 64


class Layers(Merging):
    """State of tracing with operations that place parameters in the graph."""

    def dense(
        self, x: Tensor, axis: int, weight: Tensor, transposed: bool = False, groups: int = 1,
        kind: str = "dense",
    ) -> Label:  # fmt: skip
        """Follow a layer that maps the neurons along an axis to new ones by a kernel.

        Args:
            x: Input of the layer.
            axis: Axis that it maps.
            weight: Parameter, [out, in, *positions].
            transposed: Whether it is [in, out, *positions] instead.
            groups: Number of groups of a convolution.
            kind: Kind of operation.

        Returns:
            The label of the input with new neurons along the axis.

        Raises:
            NotFollowed: If the weight is not made of parameters, or their layout has no kernel.
        """
        weights = self.weights(weight)
        require(bool(weights))
        first, *others = weights
        shape = tuple(weight.shape)
        out = shape[1] * groups if transposed else shape[0]
        if not first.dense and len(shape) == 2:  # transposed view of the parameter
            first, transposed = first.transposed(), not transposed
            others = [other.transposed() for other in others]
        name = self.layer_name(weights)
        read = self.builder.read_axis(self.input_label(x, axis, name), axis, name)
        label, source, start, count, inside = read
        require(first.dense and not (inside and (transposed or groups > 1)))
        if sole_factor(label, axis) is None and not inside:
            require(groups == 1 and not others and not first.masked)
            return self._dense_in_parts(label, axis, first, transposed)
        if not self.is_exchangeable(x):
            self.set_label(x, label)
        target = self.builder.new_set(name, out)
        rows = first.shape[0] // groups
        if inside:  # flattened map: the pixels of a channel are adjacent
            grid, positions = (1, rows, count), (*(f.size for f in inside), *first.shape[2:])
        else:
            grid, positions = (groups, rows, first.shape[1]), first.shape[2:]
        kernel = Kernel(
            first.parameter, source, target, grid, positions, first.start, start,
            from_rows=transposed, kind=kind,
        )  # fmt: skip
        self.builder.add_kernel(kernel)
        for other in others:
            self._add_component(kernel, first, other)
        if first.masked:
            self.builder.add_places(source)
            self.builder.add_places(target)
        return label.with_axis(axis, (Factor(out, target, 1),)).pruned()

    def input_label(self, x: Tensor, axis: int, name: str) -> Label:
        """Return the label of an input that a layer reads along an axis.

        Exchangeable entries, such as an initial state of zeros, become a set of interchangeable
        neurons, also if they are concatenated with inputs.
        """
        label, axis = self.label(x), axis % x.dim()
        size = x.shape[axis]
        pieces = {axis: [(size, True)]} if self.is_exchangeable(x) else self.pieces.get(x)
        if label.sets() or size == 1 or pieces is None or axis not in pieces:
            return label
        target, at = self.builder.new_merge("start", size), 0
        for n, exchangeable in pieces[axis]:
            if not exchangeable:
                own = Factor(n, self.builder.new_inputs(f"input of {name}", n), 1)
                self.builder.connect([Factor(n, target, 1)], [own], (at, 0), True, "start")
            at += n
        return label.with_axis(axis, (Factor(size, target, 1),))

    def dense_folded(self, x: Tensor, tensor: Tensor) -> Label:
        """Follow a product with a folded parameter, [..., in, out].

        ``torch.einsum`` folds parameters: all heads or experts and their entries become one axis.
        """
        found = self.folded.get(tensor)
        if found is None or found[0].masked:
            raise NotFollowed
        weight, (*_, read, written) = found
        steps, name, label = weight.axes, self.layer_name([weight]), self.label(x)
        last = len(label.axes) - 1
        factors, _ = refined(label.axes[last], tuple(Factor(steps[i][0]) for i in read))
        require(len(factors) == len(read))
        # In the order of the parameter, outermost first.
        order = sorted(range(len(read)), key=lambda i: -steps[read[i]][1])
        new = sorted(written, key=lambda i: -steps[i][1])
        *rows_outside, rows = _coalesced_axes([steps[read[i]] for i in order])
        *columns_outside, columns = _coalesced_axes([steps[i] for i in new])
        from_rows = columns.stride == 1 and rows.stride == columns.size
        require(from_rows or (rows.stride == 1 and columns.stride == rows.size))
        require(math.prod(f.size for f in (*rows_outside, *columns_outside)) <= MOST_PARTS)
        stored = label.with_axis(last, coalesced([factors[i] for i in order]))
        stored, source, start, _, inside = self.builder.read_axis(stored, last, name)
        require(not inside and sole_factor(stored, last) is not None)
        if all(f.set is None for f in label.axes[last]):  # data, which became inputs
            there = row_major([steps[read[i]][0] for i in order], source)
            back = coalesced([there[order.index(i)] for i in range(len(order))])
            self.set_label(x, label.with_axis(last, back))
        target = self.builder.new_set(name, math.prod(steps[i][0] for i in written))
        inner = (rows.size, columns.size) if from_rows else (columns.size, rows.size)
        for (i, row), (j, column) in itertools.product(
            enumerate(_offsets(rows_outside)), enumerate(_offsets(columns_outside))
        ):
            self.builder.add_kernel(
                Kernel(
                    weight.parameter, source, target, (1, *inner), (), weight.start + row + column,
                    start + i * rows.size, j * columns.size, from_rows=from_rows,
                )
            )  # fmt: skip
        made = dict(zip(new, row_major([steps[i][0] for i in new], target), strict=True))
        return stored.with_axis(last, coalesced([made[i] for i in written])).pruned()

    def _add_component(self, kernel: Kernel, weight: Weight, other: Weight) -> None:
        """Add a further parameter of a weight that is computed from several elementwise.

        A parameter of the same shape becomes another kernel. Lengths of rows or columns, as in
        weight normalization, become a bias of the neurons. Otherwise, neurons that the parameter
        distinguishes are connected to place nodes.
        """
        wide = [i for i, (n, step) in enumerate(other.axes) if n > 1 and step]
        read, written = (kernel.source, kernel.source_start), (kernel.target, kernel.target_start)
        rows, columns = (read, written) if kernel.from_rows else (written, read)
        sides = [(*rows, kernel.grid[0] * kernel.grid[1])]
        if kernel.grid[0] == 1:
            sides.append((*columns, kernel.grid[2]))
        if not other.masked and other.axes == weight.axes:
            self.builder.add_kernel(replace(kernel, parameter=other.parameter, start=other.start))
        elif not other.masked and len(wide) == 1 and wide[0] < len(sides):
            s, at, n = sides[wide[0]]
            if other.shape[wide[0]] == n and other.strides[wide[0]] == 1:
                self.builder.add_bias(Bias(other.parameter, s, n, other.start, at))
            else:
                self.builder.add_places(s)
        elif any(i < 2 for i in wide):
            self.builder.add_places(kernel.source)
            self.builder.add_places(kernel.target)

    def _dense_in_parts(self, label: Label, axis: int, weight: Weight, transposed: bool) -> Label:
        """Follow a layer whose kernel is shared by parts of a set, such as heads."""
        axis %= len(label.axes)
        (inner,) = label.axes[axis]
        assert inner.set is not None
        outer = [f for i, a in enumerate(label.axes) for f in a if i != axis and f.set == inner.set]
        parts, name = math.prod(f.size for f in outer), self.layer_name([weight])
        require(parts <= MOST_PARTS and inner.stride == 1)
        rows, columns = weight.shape[0], weight.shape[1]
        out = columns if transposed else rows
        target = self.builder.new_set(name, parts * out)
        start = label.start.get(inner.set, 0)
        for i, at in enumerate(_offsets(outer)):
            self.builder.add_kernel(
                Kernel(
                    weight.parameter, inner.set, target, (1, rows, columns), weight.shape[2:],
                    weight.start, start + at, i * out, from_rows=transposed,
                )
            )  # fmt: skip
        *numbers, last = row_major([*(f.size for f in outer), out], target)
        there = iter(numbers)
        axes = [
            (last,) if i == axis else tuple(next(there) if f.set == inner.set else f for f in a)
            for i, a in enumerate(label.axes)
        ]
        return Label(tuple(axes), label.start).pruned()

    def bias(self, label: Label, axis: int, tensor: Tensor | None) -> Label:
        """Follow the addition of a vector, usually a parameter, to the neurons along an axis."""
        if self.weights(tensor):
            return self.add_parameter(label, tensor, axis=axis)
        if tensor is not None and not self.is_exchangeable(tensor):
            self.builder.fix_order(f.set for f in label.axes[axis])
        return label

    def scale(self, label: Label, axis: int, tensor: Tensor | None, kind: str = "norm") -> Label:
        """Follow the multiplication of the neurons along an axis by a vector, if there is one."""
        weights = self.weights(tensor)
        if not weights:
            if tensor is not None and not self.is_exchangeable(tensor):
                self.builder.fix_order(f.set for f in label.axes[axis])
            return label
        neurons = any(f.set is not None for f in label.axes[axis])
        if (neurons and sole_factor(label, axis) is None) or not weights[0].dense:
            return self._multiply_as_sets(label, weights, axis)
        read = self.builder.read_axis(label, axis, self.layer_name(weights))
        label, source, start, count, inside = read
        if inside or math.prod(weights[0].shape) != count:
            return self._multiply_as_sets(label, weights, axis)
        target = self.builder.new_set(self.layer_name(weights), count)
        for other in weights:
            if other.dense and math.prod(other.shape) == count:
                grid = (count, 1, 1)
                self.builder.add_kernel(
                    Kernel(other.parameter, source, target, grid, (), other.start, start, kind=kind)
                )
            elif any(step for n, step in other.axes if n > 1):
                self.builder.add_places(target)
        if any(weight.masked for weight in weights):
            self.builder.add_places(target)
        return label.with_axis(axis, (Factor(count, target, 1),)).pruned()

    def add_parameter(
        self, label: Label, tensor: Tensor | None, kind: str = "sum", axis: int = -1
    ) -> Label:
        """Follow an elementwise "sum" or "product" of a labelled tensor with a weight.

        The last axis of the weight is aligned with ``axis`` of the label. Neurons keep their order
        if the weight distinguishes them and has no place in the graph.
        """
        for weight in self.weights(tensor):
            last = axis if axis < 0 else axis - len(label.axes)
            wide = [  # (axis of the label, counted from the last; size; stride)
                (i + 1 - len(weight.shape) + last, n, stride)
                for i, (n, stride) in enumerate(weight.axes)
                if n > 1 and (stride or weight.masked)  # constants may vary along it
            ]
            along = [at for at, _, _ in wide if -at <= len(label.axes)]
            if kind == "sum" and self._add_in_place(label, weight, wide, last):
                label = as_varying(label, along)
            else:
                label = self._merge_parameter(label, weight, along, kind)
        return label

    def _add_in_place(
        self, label: Label, weight: Weight, wide: Sequence[tuple[int, int, int]], last: int
    ) -> bool:
        """Add a summand as a bias, or as a table of positions; return whether it was possible.

        ``wide`` has the axis of the label, the size and the stride of each axis longer than 1.
        """
        of_neurons = [
            (axis, n, stride)
            for axis, n, stride in wide
            if -axis <= len(label.axes) and any(f.set is not None for f in label.axes[axis])
        ]
        if not wide:
            if label.shape[last] != 1:  # one number for all neurons: no place, no distinction
                return True
            of_neurons = [(last, 1, 1)]  # one number for one neuron
        if not of_neurons and wide:  # distinguishes no neurons
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
            if weight.masked:
                self.builder.add_places(factor.set)
            return True
        if weight.masked:
            return False
        name = self.builder.names[weight.parameter]
        positions = tuple(n for a, n, _ in wide if a > axis)
        if stride == 1:  # [places, neurons]
            grid, from_rows, positions, places = (1, others, size), True, (), others
        elif stride == math.prod(positions) == others:  # [neurons, *positions]
            grid, from_rows, places = (1, size, 1), False, 1
        else:
            return False
        source = self.builder.new_inputs(f"places of {name}", places)
        self.builder.add_kernel(
            Kernel(
                weight.parameter, source, factor.set, grid, positions, weight.start,
                target_start=at, from_rows=from_rows, kind="lookup",
            )
        )  # fmt: skip
        return True

    def _multiply_as_sets(self, label: Label, weights: Sequence[Weight], axis: int) -> Label:
        """Follow factors along an axis as sets of their own."""
        for weight in weights:
            label = self._merge_parameter(label, weight, [axis], "product")
        return label

    def _merge_parameter(
        self, label: Label, weight: Weight, axes: Sequence[int], kind: str
    ) -> Label:
        """Combine a parameter as a set of its own, with a neuron for each scalar.

        For scalars that several neurons share, such as the scales of a norm that all heads share.
        ``axes`` are the axes of the label for each axis of the parameter longer than 1.
        """
        sizes = [n for n, step in weight.axes if n > 1 and step]
        ends = [axis % len(label.axes) for axis in axes]
        whole = all(label.shape[at] == n for at, n in zip(ends, sizes, strict=False))
        of_neurons = [f.set is not None or f.is_expanded for at in ends for f in label.axes[at]]
        known = all(of_neurons) and any(f.set is not None for at in ends for f in label.axes[at])
        if len(sizes) != len(ends) or not whole or not known or weight.masked or not weight.solid:
            self.builder.fix_order(f.set for at in ends for f in label.axes[at])
            return as_varying(label, ends)
        size = math.prod(sizes)
        own = self.builder.new_set(self.builder.names[weight.parameter], size)
        self.builder.add_bias(Bias(weight.parameter, own, size, weight.start))
        mine: list[Axis] = [()] * len(label.axes)
        for at, factor in zip(ends, row_major(sizes, own), strict=True):
            mine[at] = (factor,)
        return self.combine(label, Label(tuple(mine)), label.shape, kind, symmetric=kind == "sum")

    def lookup(self, index: Tensor, table: Tensor) -> Label:
        """Follow a table lookup: a kernel whose sources are the rows, each a distinct input."""
        weights = self.weights(table)
        require(bool(weights) and weights[0].dense)
        (first, *others), name = weights, self.layer_name(weights)
        rows, columns = first.shape
        kernel = self.builder.add_table(first.parameter, name, rows, columns, first.start)
        for other in others:
            self._add_component(kernel, first, other)
        if first.masked:
            self.builder.add_places(kernel.target)
        return Label((*data(index.shape).axes, (Factor(columns, kernel.target, 1),)))


def _coalesced_axes(steps: Sequence[tuple[int, int]]) -> Axis:
    """Merge axes (size, stride) of a parameter, outermost first, where possible."""
    return coalesced([Factor(n, 0, stride) for n, stride in steps if n > 1]) or (Factor(1, 0, 1),)


def _offsets(factors: Sequence[Factor]) -> list[int]:
    """Return the offsets of all steps through factors, the last one fastest."""
    steps = itertools.product(*(range(f.size) for f in factors))
    return [sum(n * f.stride for n, f in zip(at, factors, strict=True)) for at in steps]
