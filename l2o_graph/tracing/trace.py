"""A network's computation, followed operation by operation.

Neurons are what the entries along an axis of a tensor stand for. A parameter that maps one axis to
another joins their neurons; wherever neurons meet otherwise, in a sum, a product, a concatenation
or a mean over some of them, new neurons are joined to them by edges of the constant 1. Nothing
more is needed for residual additions, gates, attention and its heads: their symmetries are those
of the graph.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from l2o_graph.architecture import Bias, Kernel
from l2o_graph.tracing.beside import Beside, Geometry, storage_of
from l2o_graph.tracing.builder import Builder, Weight, numbered
from l2o_graph.tracing.labels import Axis, Factor, Label, alike, data, joined, refined

# A layer that maps more parts of a set alike than this is not followed.
MOST_PARTS = 64


@dataclass(frozen=True, slots=True)
class Side:
    """Neurons of one set on their way to a meeting.

    Attributes:
        set: Index of the set.
        factors: How they run through it, those without it being places where one neuron serves.
        start: First neuron.
        constant: Which of the ``CONSTANTS`` their edges carry.
    """

    set: int
    factors: tuple[Factor, ...]
    start: int
    constant: int


class Trace:
    """What is known of every tensor so far, and what a rule for a layer may say of its output.

    Args:
        named: The parameters by name, as the network sees them.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]]):
        self.builder = Builder([name for name, _ in named], [tuple(p.shape) for _, p in named])
        # Several may be parts of one storage: flattened ones, as cuDNN's LSTMs have them.
        self._of_storage: dict[int | None, list[tuple[int, int, int]]] = {}
        self._strides = [tuple(p.stride()) for _, p in named]
        for i, (_, p) in enumerate(named):
            self.place(i, p)
        self._labels: Beside[Label] = Beside()
        self._derived: Beside[list[Weight]] = Beside()
        self._folded: Beside[tuple[Weight, tuple[tuple[int, ...], ...]]] = Beside()
        self._even: Beside[bool] = Beside()
        self._statistics: Beside[bool] = Beside()
        self._knows: Beside[set[int]] = Beside()
        self.used: set[int] = set()  # parameters that any operation has read
        self.known_sets: dict[nn.Module, int] = {}  # of layers that are called step by step
        self.is_blind = False  # whether anything was computed with tensors that are sharded

    def place(self, index: int, tensor: Tensor) -> None:
        """Say that a tensor is a parameter; one that is sharded is put together to be used."""
        key = storage_of(tensor)
        if key is not None and not hasattr(tensor, "full_tensor"):
            self._of_storage.setdefault(key, []).append((*_span(tensor), index))

    # What tensors are --------------------------------------------------------------------------

    def label(self, tensor: Tensor) -> Label:
        """Of a tensor; data where nothing is known."""
        known = self._labels.get(tensor)
        if known is not None and known.shape == tensor.shape:
            return known
        label = data(tensor.shape)
        for i, (n, stride) in enumerate(zip(*_pairs(tensor), strict=True)):
            if stride == 0 and n > 1:
                label = label.with_axis(i, (alike(n),))
        return label

    def set_label(self, tensor: Tensor, label: Label | None) -> None:
        """Say what a tensor is."""
        fits = label is not None and label.shape == tuple(tensor.shape)
        self._labels.put(tensor, label if fits else None)

    def labels_sharing(self, tensor: Tensor) -> list[tuple[Geometry, Label]]:
        """Labels of other tensors that lie in the same storage, and where they lie."""
        return self._labels.sharing(tensor)

    def hidden_in(self, tensor: Tensor) -> list[int]:
        """Sets that run through parts of a tensor of which nothing is known as a whole."""
        if self.label(tensor).sets():
            return []
        return [s for _, label in self.labels_sharing(tensor) for s in label.sets()]

    def relabel(self, tensor: Tensor, where: Geometry, label: Label | None) -> None:
        """Say what another tensor in the same storage is."""
        self._labels.rewrite(tensor, where, label)

    def is_even(self, tensor: Tensor) -> bool:
        """Whether all entries are one number, so that no order of them can be told."""
        return tensor.numel() == 1 or bool(self._even.get(tensor))

    def set_even(self, tensor: Tensor, even: bool) -> None:
        """Say whether all entries of a tensor are one number."""
        self._even.put(tensor, even or None)

    def uneven(self, tensor: Tensor) -> None:
        """Say that a tensor was written, so that whatever lies in its storage has an order."""
        for where, _ in self._even.sharing(tensor):
            self._even.rewrite(tensor, where, None)
        self._even.drop(tensor)

    def is_statistic(self, tensor: Tensor) -> bool:
        """Whether entries are sums over parameters, which permute as those do."""
        return bool(self._statistics.get(tensor))

    def set_statistic(self, tensor: Tensor, statistic: bool) -> None:
        """Say whether entries of a tensor are sums over parameters."""
        self._statistics.put(tensor, statistic or None)

    def knows(self, tensor: Tensor) -> set[int]:
        """The sets whose order the numbers of a tensor tell, as those of an argmax do."""
        return self._knows.get(tensor) or set()

    def set_knows(self, tensor: Tensor, sets: set[int]) -> None:
        """Say of which sets the numbers of a tensor tell the order."""
        self._knows.put(tensor, sets or None)

    def operand(self, tensor: Tensor) -> Label:
        """Of a tensor that meets others: what has no order to tell is as broad as nothing."""
        label = self.label(tensor)
        if not label.sets() and (self.is_even(tensor) or self.weights(tensor)):
            return data((1,) * tensor.dim())
        return label

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of parameters, and no neurons run through it."""
        return not self.label(tensor).sets() and bool(self.weights(tensor))

    def weights(self, tensor: Tensor | None) -> list[Weight]:
        """The parameters that a tensor is a view of, or was made of entry by entry."""
        if tensor is None:
            return []
        derived = self._derived.get(tensor)
        if derived is not None:
            return derived
        key = storage_of(tensor)
        if key not in self._of_storage:
            return []
        first, last = _span(tensor)
        for start, stop, index in self._of_storage[key]:
            if start <= first and last <= stop:
                self.used.add(index)
                own = self._as_stored(index, first - start, tensor)
                return [] if own is None else [own]
        return []

    def _as_stored(self, index: int, start: int, view: Tensor) -> Weight | None:
        """A view of a parameter as one of the parameter laid out row by row.

        None where the parameter itself is laid out otherwise, as channels_last kernels are, and
        the view does not run along its axes.
        """
        shape, strides = self.builder.shapes[index], self._strides[index]
        here = Weight(index, start, tuple(view.shape), tuple(view.stride()))
        rows = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if Weight(index, 0, shape, strides).dense:
            return here
        steps = {stride: row for n, stride, row in zip(shape, strides, rows, strict=True) if n > 1}
        wide = [n for n in shape if n > 1]
        if (
            start
            or sorted(wide) != sorted(n for n in view.shape if n > 1)
            or len(steps) < len(wide)
        ):
            return None
        if any(stride not in steps for n, stride in zip(*_pairs(view), strict=True) if n > 1):
            return None
        along = tuple(
            steps[stride] if n > 1 else 1 for n, stride in zip(*_pairs(view), strict=True)
        )
        return Weight(index, 0, tuple(view.shape), along)

    def keeps_axes(self, tensor: Tensor) -> bool:
        """Whether no axis of the parameters that a tensor is made of is cut in several."""
        for weight in self.weights(tensor):
            shape = self.builder.shapes[weight.parameter]
            ends = {math.prod(shape[i:]) for i in range(len(shape) + 1)}
            for n, step in zip(*_steps(weight), strict=True):
                if n > 1 and step and not {step, step * n} <= ends:
                    return False
        return True

    def derive(self, tensor: Tensor, weights: list[Weight]) -> None:
        """Say that a tensor was made of parameters alone."""
        self._derived.put(tensor, weights)

    def folded(self, tensor: Tensor) -> tuple[Weight, tuple[tuple[int, ...], ...]] | None:
        """A view of a parameter whose axes were joined to those of a tensor, in any order.

        Returns:
            The view, and which of its axes each axis of the tensor is; None where it is none.
        """
        return self._folded.get(tensor)

    def fold(self, tensor: Tensor, weight: Weight) -> None:
        """Say that a tensor is a view of a parameter, neighbouring axes of it joined."""
        groups, rest = [], list(range(len(weight.shape)))
        for n in tensor.shape:
            group: list[int] = []
            while rest and math.prod(weight.shape[i] for i in group) < n:
                group.append(rest.pop(0))
            if math.prod(weight.shape[i] for i in group) != n:
                return
            groups.append(tuple(group))
        if all(weight.shape[i] == 1 for i in rest):
            self._folded.put(tensor, (weight, tuple(groups)))

    def forget(self, tensor: Tensor) -> None:
        """Know nothing of a tensor any more, as of one that is written anew."""
        self._labels.drop(tensor)
        self._derived.drop(tensor)
        self._folded.drop(tensor)
        self._even.drop(tensor)
        self._statistics.drop(tensor)
        self._knows.drop(tensor)

    def name(self, weights: Sequence[Weight]) -> str:
        """Of the layer that a parameter belongs to."""
        if not weights or weights[0].parameter >= len(self.builder.names):
            return ""
        name = self.builder.names[weights[0].parameter]
        return name.rpartition(".")[0] or name

    # What joins neurons ------------------------------------------------------------------------

    def dense(
        self, x: Tensor, axis: int, weight: Tensor, transposed: bool = False, groups: int = 1,
        kind: str = "dense",
    ) -> Label | None:  # fmt: skip
        """A parameter that maps the neurons along an axis to new ones.

        Args:
            x: What is mapped.
            axis: Of its neurons.
            weight: [out, in, *positions], or with ``transposed`` [in, out, *positions].
            transposed: Whether the first axis of the weight is what is read.
            groups: Of a convolution.
            kind: Of the kernel.

        Returns:
            The label with the new neurons along that axis; None where it cannot be followed.
        """
        weights = self.weights(weight)
        if not weights:
            return None
        first, *others = weights
        shape = tuple(weight.shape)
        out = shape[1] * groups if transposed else shape[0]
        if not first.dense and len(shape) == 2:  # the transpose of what the parameter stores
            first, transposed = first.turned(), not transposed
            others = [other.turned() for other in others]
        known = self.builder.read(self.label(x), axis, self.name(weights))
        if known is None or not first.dense or (known[4] and (transposed or groups > 1)):
            return None
        if _sole(known[0], axis) is None and not known[4]:
            alone = groups == 1 and not others and not first.fixed
            return self._dense_in_parts(known[0], axis, first, transposed) if alone else None
        label, source, start, count, inside = known
        self.set_label(x, label)
        target = self.builder.new_set(self.name(weights), out)
        rows = first.shape[0] // groups
        if inside:  # a flattened map: of each channel all pixels lie together
            grid, positions = (1, rows, count), (*(f.size for f in inside), *first.shape[2:])
        else:
            grid, positions = (groups, rows, first.shape[1]), first.shape[2:]
        kernel = Kernel(
            first.parameter, source, target, grid, positions, first.start, start,
            from_rows=transposed, kind=kind,
        )  # fmt: skip
        self.builder.join(kernel)
        for other in others:
            self._made_of_too(kernel, first, other)
        if first.fixed:
            self.builder.fix(source)
            self.builder.fix(target)
        return label.with_axis(axis, (Factor(out, target, 1),)).only()

    def dense_folded(self, x: Tensor, tensor: Tensor) -> Label | None:
        """A folded parameter, [..., in, out], that maps the last axis of a tensor to a new one.

        As einsum has them: the entries of all heads, or the neurons of all experts, in one axis.
        """
        found = self.folded(tensor)
        if found is None or found[0].fixed:
            return None
        weight, (*_, read, written) = found
        steps, name = list(zip(*_steps(weight), strict=True)), self.name([weight])
        label, last = self.label(x), len(self.label(x).axes) - 1
        both = refined(label.axes[last], tuple(Factor(steps[i][0]) for i in read))
        if both is None or len(both[0]) != len(read):
            return None
        # As the parameter stores them, the outermost first.
        order = sorted(range(len(read)), key=lambda i: -steps[read[i]][1])
        label = label.with_axis(last, joined([both[0][i] for i in order]))
        if not label.sets():
            source, start, count = None, 0, x.shape[-1]
        else:
            known = self.builder.read(label, last, name)
            if known is None or known[4] or _sole(known[0], last) is None:
                return None
            label, source, start, count, _ = known
        *rows_outside, rows = _runs([steps[read[i]] for i in order])
        new = sorted(written, key=lambda i: -steps[i][1])
        *columns_outside, columns = _runs([steps[i] for i in new])
        from_rows = columns[1] == 1 and rows[1] == columns[0]
        outside = [*rows_outside, *columns_outside]
        if not (from_rows or (rows[1] == 1 and columns[1] == rows[0])):
            return None
        if math.prod(n for n, _ in outside) > MOST_PARTS:
            return None
        if source is None:
            own = self.builder.ordered(f"input of {name}", count)
            source = own.set or 0
            there = numbered([steps[read[i]][0] for i in order], source)
            back = joined([there[order.index(i)] for i in range(len(order))])
            self.set_label(x, self.label(x).with_axis(last, back))
        target = self.builder.new_set(name, math.prod(steps[i][0] for i in written))
        inner = (rows[0], columns[0]) if from_rows else (columns[0], rows[0])
        for at in itertools.product(*(range(n) for n, _ in outside)):
            first = sum(i * step for i, (_, step) in zip(at, outside, strict=True))
            of_rows, of_columns = at[: len(rows_outside)], at[len(rows_outside) :]
            self.builder.join(
                Kernel(
                    weight.parameter, source, target, (1, *inner), (), weight.start + first,
                    start + rows[0] * _number(of_rows, rows_outside),
                    columns[0] * _number(of_columns, columns_outside), from_rows=from_rows,
                )
            )  # fmt: skip
        made = dict(zip(new, numbered([steps[i][0] for i in new], target), strict=True))
        axis = joined([made[i] for i in written])
        return label.with_axis(last, axis).only()

    def _made_of_too(self, kernel: Kernel, weight: Weight, other: Weight) -> None:
        """Another parameter that the weight of a kernel was made of, entry by entry.

        One that has as many entries is a kernel beside it, the lengths of rows or columns, as in
        weight normalisation, sit on the neurons; neurons that it tells apart otherwise keep their
        order.

        Args:
            kernel: The kernel.
            weight: Its own parameter.
            other: The other one, of the same shape.
        """
        wide = [i for i, (n, step) in enumerate(zip(*_steps(other), strict=True)) if n > 1 and step]
        read, written = (kernel.source, kernel.source_start), (kernel.target, kernel.target_start)
        rows, columns = (read, written) if kernel.from_rows else (written, read)
        sides = [(*rows, kernel.grid[0] * kernel.grid[1])]
        if kernel.grid[0] == 1:
            sides.append((*columns, kernel.grid[2]))
        if not other.fixed and _steps(other) == _steps(weight):
            self.builder.join(replace(kernel, parameter=other.parameter, start=other.start))
        elif not other.fixed and len(wide) == 1 and wide[0] < len(sides):
            s, at, n = sides[wide[0]]
            if other.shape[wide[0]] == n and other.strides[wide[0]] == 1:
                self.builder.sit(Bias(other.parameter, s, n, other.start, at))
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
        for i, steps in enumerate(itertools.product(*(range(f.size) for f in outer))):
            at = start + sum(n * f.stride for n, f in zip(steps, outer, strict=True))
            self.builder.join(
                Kernel(
                    weight.parameter, inner.set, target, (1, rows, columns), weight.shape[2:],
                    weight.start, at, i * out, from_rows=transposed,
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
        if label is None or tensor is None or (self.is_even(tensor) and not self.weights(tensor)):
            return label
        for weight in self.weights(tensor):
            factor = _sole(label, axis)
            if factor is None or not weight.dense or math.prod(weight.shape) != factor.size:
                return self._own(label, weight, [axis], "sum")
            assert factor.set is not None
            at = label.start.get(factor.set, 0)
            self.builder.sit(Bias(weight.parameter, factor.set, factor.size, weight.start, at))
            if weight.fixed:
                self.builder.fix(factor.set)
        if not self.weights(tensor):
            self.builder.lose(f.set for f in label.axes[axis] if f.set is not None)
        return label

    def scale(
        self, label: Label, axis: int, tensor: Tensor | None, kind: str = "norm"
    ) -> Label | None:
        """Something that multiplies the neurons along an axis; without it they stay."""
        weights = self.weights(tensor)
        if not weights:
            if tensor is not None and not self.is_even(tensor):
                self.builder.lose(f.set for f in label.axes[axis] if f.set is not None)
            return label
        neurons = any(f.set is not None for f in label.axes[axis])
        if (neurons and _sole(label, axis) is None) or not weights[0].dense:
            return self._all_own(label, weights, axis)
        known = self.builder.read(label, axis, self.name(weights))
        if known is None:
            return None
        label, source, start, count, inside = known
        if inside or math.prod(weights[0].shape) != count:
            return self._all_own(label, weights, axis)
        target = self.builder.new_set(self.name(weights), count)
        self.builder.join(
            Kernel(
                weights[0].parameter, source, target, (count, 1, 1), (), weights[0].start, start,
                kind=kind,
            )
        )  # fmt: skip
        for other in weights[1:]:
            if other.dense and math.prod(other.shape) == count:
                self.builder.join(
                    Kernel(
                        other.parameter, source, target, (count, 1, 1), (), other.start, start,
                        kind=kind,
                    )
                )  # fmt: skip
            elif any(step for n, step in zip(*_steps(other), strict=True) if n > 1):
                self.builder.fix(target)
        if any(weight.fixed for weight in weights):
            self.builder.fix(target)
        return label.with_axis(axis, (Factor(count, target, 1),)).only()

    def _all_own(self, label: Label, weights: Sequence[Weight], axis: int) -> Label | None:
        """Parameters that multiply a tensor along an axis, as neurons of their own."""
        answer: Label | None = label
        for weight in weights:
            answer = answer and self._own(answer, weight, [axis], "product")
        return answer

    def _own(self, label: Label, weight: Weight, axes: Sequence[int], kind: str) -> Label | None:
        """A parameter that meets a tensor as neurons of its own, one for each of its scalars.

        So it is where a scalar serves several neurons, as those of a norm that all heads share.

        Args:
            label: Of the tensor.
            weight: The parameter.
            axes: Of the label, one for each axis of the parameter longer than 1.
            kind: What brings them together.
        """
        sizes = [n for n, step in zip(*_steps(weight), strict=True) if n > 1 and step]
        ends = [axis % len(label.axes) for axis in axes]
        whole = all(label.shape[at] == n for at, n in zip(ends, sizes, strict=False))
        of_neurons = [f.set is not None or f.alike for at in ends for f in label.axes[at]]
        known = all(of_neurons) and any(f.set is not None for at in ends for f in label.axes[at])
        if len(sizes) != len(ends) or not whole or not known or weight.fixed or not weight.solid:
            self.builder.lose(f.set for at in ends for f in label.axes[at] if f.set is not None)
            return _told_apart(label, ends)
        size = math.prod(sizes)
        own = self.builder.new_set(self.builder.names[weight.parameter], size)
        self.builder.sit(Bias(weight.parameter, own, size, weight.start))
        mine: list[Axis] = [()] * len(label.axes)
        for at, factor in zip(ends, numbered(sizes, own), strict=True):
            mine[at] = (factor,)
        return self.meet(label, Label(tuple(mine)), label.shape, kind, alike=kind == "sum")

    def lookup(self, index: Tensor, table: Tensor) -> Label | None:
        """Rows of a table, picked by an index: each row is an input of its own."""
        weights = self.weights(table)
        if not weights or not weights[0].dense:
            return None
        (first, *others), name = weights, self.name(weights)
        rows, columns = first.shape
        source = self.builder.ordered(f"rows of {name}", rows).set
        target = self.builder.new_set(name, columns)
        assert source is not None
        kernel = Kernel(
            first.parameter, source, target, (1, rows, columns), (), first.start, from_rows=True,
            kind="lookup",
        )  # fmt: skip
        self.builder.join(kernel)
        for other in others:
            self._made_of_too(kernel, first, other)
        if first.fixed:
            self.builder.fix(target)
        return Label((*data(index.shape).axes, (Factor(columns, target, 1),)))

    # Where neurons meet ------------------------------------------------------------------------

    def meet(
        self, one: Label, other: Label, shape: Sequence[int], kind: str, alike: bool = True
    ) -> Label | None:
        """Entries of two tensors that come together, after broadcasting to a shape.

        Args:
            one: Of the first tensor.
            other: Of the second.
            shape: Of both together.
            kind: What brings them together.
            alike: Whether it would be the same with the two exchanged.
        """
        places: list[tuple[int, Factor, Factor]] = []
        for axis, size in enumerate(shape):
            a, b = (_broadcast(label, axis - len(shape), size) for label in (one, other))
            both = refined(a, b)
            if both is None:
                return None
            places += [(axis, x, y) for x, y in zip(*both, strict=True)]
        if one.sets() or other.sets():  # what is data in one and neurons in the other has an order
            places = [self._pinned(*place) for place in places]
        answer = {
            i: b if a.alike or (a.set is None and b.set is not None) else a
            for i, (_, a, b) in enumerate(places)
        }
        start = {**other.start, **one.start}
        shared = set(one.sets()) & set(other.sets())
        for ours, theirs in _components(places, shared):
            where = [i for i, (_, a, b) in enumerate(places) if a.set in ours or b.set in theirs]
            sides, others = (
                [
                    Side(s, tuple(_of(places[i][at], s) for i in where), label.start.get(s, 0), 0)
                    for s in sets
                ]
                for at, label, sets in ((1, one, ours), (2, other, theirs))
            )
            if alike and len({*sides, *others}) == 1:
                continue
            # Parts of one set are told apart: what was done to each on the way may differ.
            sides += [replace(side, constant=int(not alike or side.set in ours)) for side in others]
            sizes = [places[i][1].size for i in where]
            target = self._meeting_place(sides, sizes, kind)
            if target is None:
                return None
            for i, factor in zip(where, numbered(sizes, target), strict=True):
                answer[i] = factor
            start.pop(target, None)
        axes = [
            joined([answer[i] for i, place in enumerate(places) if place[0] == axis])
            for axis in range(len(shape))
        ]
        return Label(tuple(axes), start).only()

    def _pinned(self, axis: int, a: Factor, b: Factor) -> tuple[int, Factor, Factor]:
        if a.set is None and b.set is not None and not a.alike:
            a = self.builder.ordered("places", a.size)
        elif b.set is None and a.set is not None and not b.alike:
            b = self.builder.ordered("places", b.size)
        return axis, a, b

    def _meeting_place(self, sides: list["Side"], sizes: list[int], kind: str) -> int | None:
        """A set with a neuron for each entry, joined to all sides."""
        size, target = math.prod(sizes), None
        if kind == "sum":  # neurons that nothing else has read yet can take the others in
            for side in reversed(sides):
                found = self.builder.sets[side.set]
                whole = found.size == size and side.start == 0
                whole = whole and list(side.factors) == numbered(sizes, side.set)
                # Beside another part of the same set, taken in before, none could be told.
                whole = whole and not any(
                    self.builder.is_joined(each.set, side.set) for each in sides if each != side
                )
                if found.fresh and found.role == "hidden" and whole:
                    target = side.set
                    break
        if target is None:
            target = self.builder.new_meeting(kind, size)
        for side in sides:
            if side.set != target and not self.builder.relate(
                numbered(sizes, target), side.factors, (0, side.start), True, kind, side.constant
            ):
                return None
        self.builder.sets[target].fresh = True
        return target

    def reduce(self, label: Label, gone: Sequence[int], kind: str = "mean") -> Label | None:
        """The same tensor after a sum over some axes, which keep a size of 1."""
        lost = {axis % len(label.axes) for axis in gone}
        axes = [() if i in lost else axis for i, axis in enumerate(label.axes)]
        start = dict(label.start)
        for s in label.sets():
            places = [(i, f) for i, axis in enumerate(label.axes) for f in axis if f.set == s]
            kept = [f.size for i, f in places if i not in lost]
            if not kept:
                self.builder.touch(s)
                if math.prod(f.size for _, f in places) < self.builder.sets[s].size:
                    self.builder.lose([s])  # the sum tells these neurons from the others
            if len(kept) == len(places) or not kept:
                continue
            target = self.builder.new_meeting(kind, math.prod(kept))
            stays = iter(numbered(kept, target))
            small = [Factor(f.size) if i in lost else next(stays) for i, f in places]
            large = [f for _, f in places]
            if not self.builder.relate(large, small, (start.get(s, 0), 0), False, kind):
                return None
            self.builder.sets[target].fresh = True
            stays = iter(numbered(kept, target))
            axes = [tuple(next(stays) if f.set == s else f for f in axis) for axis in axes]
        return Label(tuple(axes), start).only()

    def mixed(self, label: Label, axes: Sequence[int]) -> Label | None:
        """The same tensor after each entry took in all of those along some axes, all alike.

        As by a softmax or a norm: where they are not a whole set, what they share is a neuron.
        """
        along = {axis % len(label.axes) for axis in axes}
        apart = [
            s
            for s in {f.set for i in along for f in label.axes[i] if f.set is not None}
            if math.prod(f.size for i in along for f in label.axes[i] if f.set == s)
            < self.builder.sets[s].size
        ]
        if not apart:
            return label
        sets_before = len(self.builder.sets)
        shared = self.reduce(label, sorted(along), "statistics")
        if shared is None or len(self.builder.sets) == sets_before:
            self.builder.lose(apart)
            return label
        return self.meet(label, shared, label.shape, "sum")

    def contract(self, one: Label, other: Label) -> Label | None:
        """A product of matrices, (..., i, k) and (..., k, j)."""
        left = Label((*one.axes, ()), one.start)
        right = Label((*other.axes[:-2], (), *other.axes[-2:]), other.start)
        batch = torch.broadcast_shapes(one.shape[:-2], other.shape[:-2])
        shape = (*batch, *one.shape[-2:], other.shape[-1])
        met = self.meet(left, right, shape, "product", alike=False)
        if met is None:
            return None
        summed = self.reduce(met, [-2], "sum")
        if summed is None:
            return None
        return Label((*summed.axes[:-2], summed.axes[-1]), summed.start)

    def cat(self, tensors: Sequence[Tensor], axis: int, out: Tensor) -> Label | None:
        """Tensors one after the other along an axis."""
        axis %= out.dim()
        tensors = [t for t in tensors if t.dim() == out.dim() and t.numel()]
        labels = [self.label(t) for t in tensors]
        if not any(label.sets() for label in labels):
            return None
        among = _in_common(labels, axis)
        if among is None:
            return None
        along = any(f.set is not None for label in labels for f in label.axes[axis])
        taken = _taken(labels, among, axis)
        target = None
        if along:
            target = self._side_by_side(tensors, labels, among, taken, axis, out.shape[axis])
            if target is None:
                return None
        # Along the other axes the tensors have to be of one kind, and are brought together.
        rest = []
        for t, label, axes in zip(tensors, labels, among, strict=True):
            kept = [
                tuple(alike(f.size) if (i, j) in taken else f for j, f in enumerate(factors))
                for i, factors in enumerate(axes)
            ]
            one = Label(tuple(kept), label.start) if label.sets() else self.operand(t)
            rest.append(one.with_axis(axis, ()).only())
        shape = [1 if i == axis else n for i, n in enumerate(out.shape)]
        first = next((i for i, label in enumerate(rest) if label.sets()), 0)
        answer: Label | None = self.meet(rest[first], data((1,) * out.dim()), shape, "sum")
        for label in (*rest[:first], *rest[first + 1 :]):
            answer = answer and self.meet(answer, label, shape, "sum")
        for t in tensors:
            if answer is not None and target is None and self.is_weight(t):
                answer = self.added(answer, t)
        if answer is None or target is None:
            return answer and answer.with_axis(axis, (Factor(out.shape[axis]),))
        *outer, own = numbered([*(among[0][i][j].size for i, j in taken), out.shape[axis]], target)
        for (i, j), factor in zip(taken, outer, strict=True):
            both = refined(answer.axes[i] or (alike(1),), among[0][i])
            if both is None:
                return None
            factors = (*both[0][:j], factor, *both[0][j + 1 :])
            answer = Label((*answer.axes[:i], factors, *answer.axes[i + 1 :]), answer.start)
        axes = [(own,) if i == axis else joined(a) for i, a in enumerate(answer.axes)]
        return Label(tuple(axes), answer.start).only()

    def _side_by_side(
        self, tensors: Sequence[Tensor], labels: Sequence[Label],
        among: Sequence[Sequence[Axis]], taken: Sequence[tuple[int, int]], axis: int, size: int,
    ) -> int | None:  # fmt: skip
        """A set of neurons for tensors one after the other along an axis.

        Args:
            tensors: The pieces.
            labels: Of the pieces.
            among: Their other axes, in factors of the same sizes.
            taken: Which of those factors (axis, number) the set runs through as well.
            axis: Along which they lie.
            size: Of that axis in the end.

        Returns:
            Its index, those that lie along the axis next to each other; None where it cannot be.
        """
        outer = [among[0][i][j].size for i, j in taken]
        target = self.builder.new_meeting("concatenation", math.prod(outer) * size)
        numbers = numbered([*outer, size], target)[:-1]
        # Pieces that are pixels of the same neurons are told apart by their places.
        sets = [
            {f.set for f in (*label.axes[axis], *(axes[i][j] for i, j in taken))} - {None}
            for label, axes in zip(labels, among, strict=True)
        ]
        told = any(a & b for a, b in itertools.combinations(sets, 2))
        places = self.builder.ordered("pieces", len(tensors)).set if told else None
        at = 0
        for n, (label, axes, t) in enumerate(zip(labels, among, tensors, strict=True)):
            width = t.shape[axis]
            factors = [*(axes[i][j] for i, j in taken), *(label.axes[axis] or (alike(width),))]
            if not label.sets():
                no_order = self.is_even(t) or self.weights(t)
                factors = [*(alike(m) if no_order else Factor(m) for m in outer), Factor(width)]
            inner = numbered([f.size for f in factors[len(outer) :]], target)
            large = [*numbers, *inner]
            if not self.builder.copy(label, factors, large, at, "concatenation"):
                return None
            there = [Factor(f.size, places) for f in large]
            if told and not self.builder.relate(large, there, (at, n), True, "pieces"):
                return None
            at += width
        self.builder.sets[target].fresh = True
        return target

    def added(self, label: Label, tensor: Tensor, kind: str = "sum") -> Label | None:
        """A parameter that is added to a tensor with a label, aligned at its last axis.

        Args:
            label: Of the tensor.
            tensor: The parameter.
            kind: "sum", or "product" where it multiplies the tensor.

        Returns:
            What comes of it; where the parameter has no place the neurons that it tells apart
            keep their order.
        """
        for weight in self.weights(tensor):
            axes = [
                i - len(weight.shape)
                for i, (n, step) in enumerate(zip(*_steps(weight), strict=True))
                if n > 1 and step
            ]
            wide = [axis for axis in axes if -axis <= len(label.axes)]
            if kind == "sum" and self._placed(label, weight):
                label = _told_apart(label, wide)
                continue
            met = self._own(label, weight, wide, kind)
            if met is None:
                return None
            label = met
        return label

    def _placed(self, label: Label, weight: Weight) -> bool:
        """Whether a parameter that is added finds its place as a bias or as rows of a table."""
        wide = [
            (axis - len(weight.shape), n, stride)
            for axis, (n, stride) in enumerate(zip(weight.shape, weight.strides, strict=True))
            if n > 1 and stride
        ]
        of_neurons = [
            (axis, n, stride)
            for axis, n, stride in wide
            if -axis <= len(label.axes) and any(f.set is not None for f in label.axes[axis])
        ]
        if not wide:
            if label.shape[-1] != 1:  # a single number has no place, and tells nothing apart
                return True
            of_neurons = [(-1, 1, 1)]  # a single number on a single neuron
        if not of_neurons and wide:  # it tells no neurons apart
            return True
        if len(of_neurons) != 1 or weight.fixed:
            return False
        ((axis, size, stride),) = of_neurons
        factor = _sole(label, axis)
        if factor is None or factor.set is None or factor.stride != 1 or factor.size != size:
            return not wide
        at, others = label.start.get(factor.set, 0), math.prod(n for _, n, _ in wide) // size
        if not wide or (others == 1 and stride == 1):
            self.builder.sit(Bias(weight.parameter, factor.set, size, weight.start, at))
            return True
        name = self.builder.names[weight.parameter]
        positions = tuple(n for a, n, _ in wide if a > axis)
        if stride == 1:  # [places, neurons]
            grid, from_rows, positions, places = (1, others, size), True, (), others
        elif stride == math.prod(positions) == others:  # [neurons, *positions]
            grid, from_rows, places = (1, size, 1), False, 1
        else:
            return False
        source = self.builder.ordered(f"places of {name}", places).set
        assert source is not None
        self.builder.join(
            Kernel(
                weight.parameter, source, factor.set, grid, positions, weight.start,
                target_start=at, from_rows=from_rows, kind="lookup",
            )
        )  # fmt: skip
        return True

    def activated(self, label: Label, activation: str) -> None:
        """Say what nonlinearity neurons have."""
        for s in label.sets():
            found = self.builder.sets[s]
            found.activation = found.activation or activation
            found.fresh = False


def _pairs(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return tuple(tensor.shape), tuple(tensor.stride()) if strided else (1,) * tensor.dim()


def _steps(weight: Weight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return weight.shape, weight.strides


def _runs(steps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Axes (size, stride), outermost first, as few as possible; at least one."""
    answer: list[tuple[int, int]] = []
    for size, stride in steps:
        if answer and answer[-1][1] == size * stride:
            answer[-1] = answer[-1][0] * size, stride
        elif size > 1 or not answer:
            answer.append((size, stride))
    return answer or [(1, 1)]


def _number(digits: Sequence[int], axes: Sequence[tuple[int, int]]) -> int:
    """Which of all steps along some axes it is, the last one fastest."""
    answer = 0
    for digit, (size, _) in zip(digits, axes, strict=True):
        answer = answer * size + digit
    return answer


def _told_apart(label: Label, axes: Sequence[int]) -> Label:
    """The same label where data that was alike along some axes is so no more."""
    for axis in axes:
        factors = tuple(Factor(f.size) if f.alike else f for f in label.axes[axis])
        label = label.with_axis(axis % len(label.axes), factors)
    return label


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first entry of its storage that a tensor has, and the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    first = int(tensor.storage_offset())
    return first, first + sum(max(n - 1, 0) * stride for n, stride in steps)


def _of(factor: Factor, s: int) -> Factor:
    """A factor as a set sees it: without steps where it does not run through it."""
    return factor if factor.set == s else Factor(factor.size)


def _sole(label: Label, axis: int) -> Factor | None:
    """The neurons along an axis, where they are one run of a set that runs along no other."""
    if len(label.axes[axis]) != 1 or label.axes[axis][0].set is None:
        return None
    (factor,) = label.axes[axis]
    others = [f.set for i, a in enumerate(label.axes) if i != axis % len(label.axes) for f in a]
    return None if factor.set in others else factor


def _broadcast(label: Label, axis: int, size: int) -> Axis:
    """An axis, counted from the last, of a label that is broadcast to a size there."""
    if -axis > len(label.axes) or label.shape[axis] != size:
        return (alike(size),)
    return label.axes[axis] or (alike(size),)


def _components(
    places: Sequence[tuple[int, Factor, Factor]], shared: Iterable[int]
) -> list[tuple[set[int], set[int]]]:
    """Sets of one tensor and of the other that share a place, or are one, directly or not."""
    groups: list[tuple[set[int], set[int]]] = []
    pairs = [(a.set, b.set) for _, a, b in places if a.set is not None and b.set is not None]
    for a, b in (*pairs, *((s, s) for s in shared)):
        ours, theirs, apart = {a}, {b}, []
        for group in groups:
            if group[0] & ours or group[1] & theirs:
                ours |= group[0]
                theirs |= group[1]
            else:
                apart.append(group)
        groups = [*apart, (ours, theirs)]
    return groups


def _in_common(labels: Sequence[Label], axis: int) -> list[list[Axis]] | None:
    """All axes of labels but one, in factors of the same sizes; None where their cuts cross."""
    answer: list[list[Axis]] = [[()] * len(label.axes) for label in labels]
    for i in range(len(labels[0].axes)):
        own = [label.axes[i] or (alike(1),) for label in labels]
        common = own[0]
        for other in own[1:] if i != axis else ():
            both = refined(common, other)
            if both is None:
                return None
            common = both[0]
        for each, factors in zip(answer, own, strict=True):
            both = refined(factors, common) if i != axis else ((), ())
            if both is None:
                return None
            each[i] = both[0]
    return answer


def _taken(
    labels: Sequence[Label], among: Sequence[Sequence[Axis]], axis: int
) -> list[tuple[int, int]]:
    """The factors (axis, number) of sets that run along an axis of any label, directly or not."""
    sets = {f.set for label in labels for f in label.axes[axis]} - {None}
    places = [(i, j) for i, factors in enumerate(among[0]) for j in range(len(factors))]
    known: list[tuple[int, int]] = []
    while True:
        found = [(i, j) for i, j in places if any(each[i][j].set in sets for each in among)]
        if len(found) == len(known):
            return found
        known = found
        sets |= {each[i][j].set for each in among for i, j in found} - {None}
