"""Operations on neurons without parameters: sums, products, partial reductions."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from l2o_graph.tracing.builder import row_major
from l2o_graph.tracing.labels import Axis, Factor, Label, coalesced, data, expanded, refined
from l2o_graph.tracing.tensor_state import TensorState


@dataclass(frozen=True, slots=True)
class Operand:
    """Neurons of one set that are combined with others.

    Attributes:
        set: Index of the set.
        factors: Factors that enumerate its neurons, with those of other sets replaced by data.
        start: First neuron.
        constant: Index into the ``CONSTANTS``, for the edges.
    """

    set: int
    factors: tuple[Factor, ...]
    start: int
    constant: int


class Merging(TensorState):
    """State of tracing that connects sets by edges of constants."""

    def combine(
        self, one: Label, other: Label, shape: Sequence[int], kind: str, symmetric: bool = True
    ) -> Label | None:
        """Follow an elementwise operation of two tensors.

        Args:
            one: Label of the first tensor.
            other: Label of the second tensor.
            shape: Shape that both are broadcast to.
            kind: Kind of operation.
            symmetric: Whether the operands can be exchanged.

        Returns:
            The label of the result, or None if the operation cannot be followed.
        """
        places: list[tuple[int, Factor, Factor]] = []
        for axis, size in enumerate(shape):
            a, b = (_broadcast(label, axis - len(shape), size) for label in (one, other))
            both = refined(a, b)
            if both is None:
                return None
            places += [(axis, x, y) for x, y in zip(*both, strict=True)]
        if one.sets() or other.sets():  # data of one distinguishes neurons of the other
            places = [self._with_places(*place) for place in places]
        answer = {
            i: b if a.is_expanded or (a.set is None and b.set is not None) else a
            for i, (_, a, b) in enumerate(places)
        }
        start = {**other.start, **one.start}
        shared = set(one.sets()) & set(other.sets())
        for ours, theirs in _components(places, shared):
            where = [i for i, (_, a, b) in enumerate(places) if a.set in ours or b.set in theirs]
            sides, others = (
                [
                    Operand(
                        s, tuple(_within(factors[i], s) for i in where), label.start.get(s, 0), 0
                    )
                    for s in sets
                ]
                for factors, label, sets in (
                    ([a for _, a, _ in places], one, ours),
                    ([b for _, _, b in places], other, theirs),
                )
            )
            if symmetric and len({*sides, *others}) == 1:
                continue
            # Parts of one set are distinguished: different operations may have changed them.
            sides += [
                replace(side, constant=int(not symmetric or side.set in ours)) for side in others
            ]
            sizes = [places[i][1].size for i in where]
            target = self._merge_set(sides, sizes, kind)
            if target is None:
                return None
            for i, factor in zip(where, row_major(sizes, target), strict=True):
                answer[i] = factor
            start.pop(target, None)
        axes = [
            coalesced([answer[i] for i, place in enumerate(places) if place[0] == axis])
            for axis in range(len(shape))
        ]
        return Label(tuple(axes), start).pruned()

    def _with_places(self, axis: int, a: Factor, b: Factor) -> tuple[int, Factor, Factor]:
        """Turn varying data at the place of neurons into inputs."""
        if a.set is None and b.set is not None and not a.is_expanded:
            a = Factor(a.size, self.builder.new_inputs("places", a.size), 1)
        elif b.set is None and a.set is not None and not b.is_expanded:
            b = Factor(b.size, self.builder.new_inputs("places", b.size), 1)
        return axis, a, b

    def _merge_set(self, sides: list["Operand"], sizes: list[int], kind: str) -> int | None:
        """Return a set with a neuron for each entry, connected to all operands."""
        size, target = math.prod(sizes), None
        if kind == "sum":  # a fresh set can take the others in
            for side in reversed(sides):
                found = self.builder.sets[side.set]
                whole = found.size == size and side.start == 0
                whole = whole and list(side.factors) == row_major(sizes, side.set)
                # Not if it has taken in another part of the same set: both would look the same.
                whole = whole and not any(
                    self.builder.is_connected(each.set, side.set) for each in sides if each != side
                )
                if found.fresh and found.role == "hidden" and whole:
                    target = side.set
                    break
        if target is None:
            target = self.builder.new_merge(kind, size)
        for side in sides:
            if side.set != target and not self.builder.connect(
                row_major(sizes, target), side.factors, (0, side.start), True, kind, side.constant
            ):
                return None
        self.builder.sets[target].fresh = True
        return target

    def reduce(self, label: Label, gone: Sequence[int], kind: str = "mean") -> Label | None:
        """Follow a reduction over axes, which keep size 1; None if it cannot be followed."""
        lost = {axis % len(label.axes) for axis in gone}
        axes = [() if i in lost else axis for i, axis in enumerate(label.axes)]
        start = dict(label.start)
        for s in label.sets():
            places = [(i, f) for i, axis in enumerate(label.axes) for f in axis if f.set == s]
            kept = [f.size for i, f in places if i not in lost]
            if not kept:
                self.builder.mark_read(s)
                if math.prod(f.size for _, f in places) < self.builder.sets[s].size:
                    self.builder.fix_order([s])  # the sum distinguishes them from the others
            if len(kept) == len(places) or not kept:
                continue
            target = self.builder.new_merge(kind, math.prod(kept))
            stays = iter(row_major(kept, target))
            small = [Factor(f.size) if i in lost else next(stays) for i, f in places]
            large = [f for _, f in places]
            if not self.builder.connect(large, small, (start.get(s, 0), 0), False, kind):
                return None
            self.builder.sets[target].fresh = True
            stays = iter(row_major(kept, target))
            axes = [tuple(next(stays) if f.set == s else f for f in axis) for axis in axes]
        return Label(tuple(axes), start).pruned()

    def as_places(self, label: Label, axes: Sequence[int]) -> Label:
        """Turn neurons along some axes into positions of the neurons along the others.

        For example, a vector that is reshaped to a feature map (C, H, W) has C channels with a
        known position for each entry. Without neurons along other axes, the order is fixed.
        """
        for s in label.sets():
            found = [(i, f) for i, axis in enumerate(label.axes) for f in axis if f.set == s]
            sizes = [f.size for i, f in found if i in axes]
            if not sizes:
                continue
            places = iter(row_major(sizes, self.builder.new_inputs("places", math.prod(sizes))))
            small = [next(places) if i in axes else Factor(f.size) for i, f in found]
            large, start = [f for _, f in found], label.start.get(s, 0)
            if len(sizes) == len(found) or not self.builder.connect(
                large, small, (start, 0), True, "places"
            ):
                self.builder.fix_order([s])
        reduced = self.reduce(label, axes, "map")
        if reduced is None:
            self.builder.fix_order(label.sets())
            return data(label.shape)
        for i in axes:
            reduced = reduced.with_axis(i, (Factor(label.shape[i]),))
        return reduced.pruned()

    def mixed(self, label: Label, axes: Sequence[int]) -> Label | None:
        """Follow an operation in which entries depend on a symmetric statistic along some axes.

        Examples are a softmax and a norm. If the axes do not enumerate a whole set, the statistic
        becomes a neuron.
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
            self.builder.fix_order(apart)
            return label
        return self.combine(label, shared, label.shape, "sum")

    def contract(self, one: Label, other: Label) -> Label | None:
        """Follow a matrix product, (..., i, k) (..., k, j) -> (..., i, j)."""
        left = Label((*one.axes, ()), one.start)
        right = Label((*other.axes[:-2], (), *other.axes[-2:]), other.start)
        batch = torch.broadcast_shapes(one.shape[:-2], other.shape[:-2])
        shape = (*batch, *one.shape[-2:], other.shape[-1])
        met = self.combine(left, right, shape, "product", symmetric=False)
        if met is None:
            return None
        summed = self.reduce(met, [-2], "sum")
        if summed is None:
            return None
        return Label((*summed.axes[:-2], summed.axes[-1]), summed.start)


def _within(factor: Factor, s: int) -> Factor:
    """Return a factor as it is, or as data if it does not enumerate the set."""
    return factor if factor.set == s else Factor(factor.size)


def _broadcast(label: Label, axis: int, size: int) -> Axis:
    """Return the factors of an axis, counted from the last, broadcast to a size."""
    if -axis > len(label.axes) or label.shape[axis] != size:
        return (expanded(size),)
    return label.axes[axis] or (expanded(size),)


def _components(
    places: Sequence[tuple[int, Factor, Factor]], shared: Iterable[int]
) -> list[tuple[set[int], set[int]]]:
    """Return connected components of the sets of two tensors that share a factor or are equal."""
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
