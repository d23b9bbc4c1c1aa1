"""A network's computation, followed operation by operation.

Neurons are what the entries along an axis of a tensor stand for. A parameter that maps one axis to
another joins their neurons; wherever neurons meet otherwise, in a sum, a product, a concatenation
or a mean over some of them, new neurons are joined to them by edges of the constant 1. Nothing
more is needed for residual additions, gates, attention and its heads: their symmetries are those
of the graph.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from l2o_graph.architecture import Bias, Kernel
from l2o_graph.tracing.builder import Builder, Weight, numbered
from l2o_graph.tracing.labels import Axis, Factor, Label, data, joined, refined


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
        self.builder = Builder(named)
        # Several may be parts of one storage: flattened ones, as cuDNN's LSTMs have them.
        self._of_storage: dict[int, list[tuple[int, int, int]]] = {}
        for i, (_, p) in enumerate(named):
            self._of_storage.setdefault(_storage(p), []).append((*_span(p), i))
        self._labels = WeakTensorKeyDictionary()
        self._derived = WeakTensorKeyDictionary()
        self.used: set[int] = set()  # parameters that any operation has read
        self.known_sets: dict[nn.Module, int] = {}  # of layers that are called step by step

    # What tensors are --------------------------------------------------------------------------

    def label(self, tensor: Tensor) -> Label:
        """Of a tensor; data where nothing is known."""
        known = self._labels.get(tensor)
        return known if known is not None and known.shape == tensor.shape else data(tensor.shape)

    def set_label(self, tensor: Tensor, label: Label | None) -> None:
        """Say what a tensor is."""
        if label is not None and label.shape == tuple(tensor.shape):
            self._labels[tensor] = label
        else:
            self._labels.pop(tensor, None)

    def weights(self, tensor: Tensor | None) -> list[Weight]:
        """The parameters that a tensor is a view of, or was made of entry by entry."""
        if tensor is None:
            return []
        if tensor in self._derived:
            return self._derived[tensor]
        first, last = _span(tensor)
        for start, stop, index in self._of_storage.get(_storage(tensor), ()):
            if start <= first and last <= stop:
                self.used.add(index)
                own = first - start, tuple(tensor.shape), tuple(tensor.stride())
                return [Weight(index, *own)]
        return []

    def derive(self, tensor: Tensor, weights: list[Weight]) -> None:
        """Say that a tensor was made of parameters alone."""
        self._derived[tensor] = weights

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
        known = self.builder.read(self.label(x), axis, self.name(weights))
        if known is None or not first.dense or (known[4] and transposed):
            return None
        label, source, start, count, inside = known
        self.set_label(x, label)
        target = self.builder.new_set(self.name(weights), out)
        rows = first.shape[0] // groups
        if inside:  # a flattened map: of each channel all pixels lie together
            grid, positions = (1, rows, count), tuple(f.size for f in inside)
        else:
            grid, positions = (groups, rows, first.shape[1]), first.shape[2:]
        self.builder.join(
            Kernel(
                first.parameter, source, target, grid, positions, first.start, start,
                from_rows=transposed, kind=kind,
            )
        )  # fmt: skip
        for other in others:  # as the lengths of rows in weight normalisation
            if math.prod(other.shape) == out and other.dense:
                self.builder.sit(Bias(other.parameter, target, out, other.start))
        return label.with_axis(axis, (Factor(out, target, 1),)).only()

    def bias(self, label: Label | None, axis: int, tensor: Tensor | None) -> None:
        """A parameter that is added to the neurons along an axis."""
        if label is None or not label.axes[axis]:
            return
        factor = label.axes[axis][0]
        for weight in self.weights(tensor):
            if factor.set is not None and weight.dense and math.prod(weight.shape) == factor.size:
                at = label.start.get(factor.set, 0)
                self.builder.sit(Bias(weight.parameter, factor.set, factor.size, weight.start, at))

    def scale(
        self, x: Tensor, axis: int, tensor: Tensor | None, kind: str = "norm"
    ) -> Label | None:
        """A parameter that multiplies the neurons along an axis; without one they stay."""
        label, weights = self.label(x), self.weights(tensor)
        if not weights:
            return label
        known = self.builder.read(label, axis, self.name(weights))
        if known is None or known[4] or not weights[0].dense:
            return label
        label, source, start, count, _ = known
        if math.prod(weights[0].shape) != count:
            return label
        target = self.builder.new_set(self.name(weights), count)
        self.builder.join(
            Kernel(
                weights[0].parameter, source, target, (count, 1, 1), (), weights[0].start, start,
                kind=kind,
            )
        )  # fmt: skip
        return label.with_axis(axis, (Factor(count, target, 1),)).only()

    def lookup(self, index: Tensor, table: Tensor) -> Label | None:
        """Rows of a table, picked by an index: each row is an input of its own."""
        weights = self.weights(table)
        if not weights or not weights[0].dense:
            return None
        (first, *_), name = weights, self.name(weights)
        rows, columns = first.shape
        source = self.builder.ordered(f"rows of {name}", rows).set
        target = self.builder.new_set(name, columns)
        assert source is not None
        self.builder.join(
            Kernel(
                first.parameter, source, target, (1, rows, columns), (), first.start,
                from_rows=True, kind="lookup",
            )
        )  # fmt: skip
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
        if one.sets() and other.sets():  # what is data in one and neurons in the other has an order
            places = [self._pinned(place, one, other, len(shape)) for place in places]
        answer = {i: a if a.set is not None else b for i, (_, a, b) in enumerate(places)}
        start = {**other.start, **one.start}
        for ours, theirs in _components(places):
            where = [i for i, (_, a, b) in enumerate(places) if a.set in ours or b.set in theirs]
            sides = [
                Side(s, tuple(_of(places[i][1], s) for i in where), one.start.get(s, 0), 0)
                for s in ours
            ] + [
                Side(
                    s, tuple(_of(places[i][2], s) for i in where), other.start.get(s, 0), not alike
                )
                for s in theirs
            ]
            if alike and len(set(sides)) == 1:
                continue
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

    def _pinned(
        self, place: tuple[int, Factor, Factor], one: Label, other: Label, axes: int
    ) -> tuple[int, Factor, Factor]:
        axis, a, b = place
        if a.set is None and b.set is not None and _spans(one, axis - axes):
            a = self.builder.ordered("places", a.size)
        elif b.set is None and a.set is not None and _spans(other, axis - axes):
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
        along = [label.axes[axis] for label in labels]
        whole: Axis = (Factor(out.shape[axis]),)
        if any(f.set is not None for factors in along for f in factors):
            target = self.builder.new_meeting("concatenation", out.shape[axis])
            at = 0
            for label, factors, t in zip(labels, along, tensors, strict=True):
                size = t.shape[axis]
                if all(f.set is None for f in factors):
                    factors = (self.builder.ordered("concatenated", size),)
                if not self.builder.copy(label, factors, target, at, "concatenation"):
                    return None
                at += size
            self.builder.sets[target].fresh = True
            whole = (Factor(out.shape[axis], target, 1),)
        # Along the other axes the tensors have to be of one kind, and are brought together.
        rest = [
            (t, label.with_axis(axis, ()).only()) for t, label in zip(tensors, labels, strict=True)
        ]
        shape = [1 if i == axis else n for i, n in enumerate(out.shape)]
        answer = rest[0][1]
        for _, label in rest[1:]:
            met = self.meet(answer, label, shape, "sum")
            if met is None:
                return None
            answer = met
        for t, label in rest:
            if not label.sets():
                self.parameter_along(answer, t)
        return answer.with_axis(axis, whole)

    def parameter_along(self, label: Label, tensor: Tensor) -> bool:
        """A parameter that is added to a tensor with a label, aligned at its last axis.

        Returns:
            Whether it found a place.
        """
        for weight in self.weights(tensor):
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
            if not wide and label.shape[-1] == 1:  # a single number on a single neuron
                of_neurons = [(-1, 1, 1)]
            if len(of_neurons) != 1 or not label.axes[of_neurons[0][0]]:
                return False
            ((axis, size, stride),) = of_neurons
            (factor, *more) = label.axes[axis]
            if more or factor.set is None or factor.stride != 1 or factor.size != size:
                return False
            at, others = label.start.get(factor.set, 0), math.prod(n for _, n, _ in wide) // size
            if others == 1 and stride == 1:
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


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first entry of its storage that a tensor has, and the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    first = int(tensor.storage_offset())
    return first, first + sum(max(n - 1, 0) * stride for n, stride in steps)


def _of(factor: Factor, s: int) -> Factor:
    """A factor as a set sees it: without steps where it does not run through it."""
    return factor if factor.set == s else Factor(factor.size)


def _spans(label: Label, axis: int) -> bool:
    """Whether a label has an axis, and is not broadcast along it."""
    return -axis <= len(label.axes) and label.shape[axis] != 1


def _broadcast(label: Label, axis: int, size: int) -> Axis:
    """An axis, counted from the last, of a label that is broadcast to a size there."""
    if -axis > len(label.axes) or label.shape[axis] != size:
        return (Factor(size),)
    return label.axes[axis] or (Factor(size),)


def _components(places: Sequence[tuple[int, Factor, Factor]]) -> list[tuple[set[int], set[int]]]:
    """Sets of one tensor and of the other that share a place, directly or not."""
    groups: list[tuple[set[int], set[int]]] = []
    for _, a, b in places:
        if a.set is None or b.set is None:
            continue
        ours, theirs, apart = {a.set}, {b.set}, []
        for group in groups:
            if group[0] & ours or group[1] & theirs:
                ours |= group[0]
                theirs |= group[1]
            else:
                apart.append(group)
        groups = [*apart, (ours, theirs)]
    return groups
