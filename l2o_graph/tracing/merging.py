"""Operations on neurons without parameters: sums, products, partial reductions."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from l2o_graph.tracing.builder import row_major
from l2o_graph.tracing.labels import (
    Factor,
    Label,
    broadcast,
    coalesced,
    expanded,
    refined,
)
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
    ) -> Label:
        """Follow an elementwise operation of two tensors that are broadcast to a shape.

        ``kind`` is the kind of operation; if it is ``symmetric``, its operands can be exchanged.
        """
        axis_of: list[int] = []  # axis of each pair of factors
        pairs: list[tuple[Factor, Factor]] = []
        both = broadcast(one, shape).axes, broadcast(other, shape).axes
        for axis, (a, b) in enumerate(zip(*both, strict=True)):
            pairs += zip(*refined(a or (expanded(1),), b or (expanded(1),)), strict=True)
            axis_of += [axis] * (len(pairs) - len(axis_of))
        if one.sets() or other.sets():  # data of one distinguishes neurons of the other
            pairs = [self._with_places(a, b) for a, b in pairs]
        answer = [
            b if a.is_expanded or (a.set is None and b.set is not None) else a for a, b in pairs
        ]
        start = {**other.start, **one.start}
        shared = set(one.sets()) & set(other.sets())
        for ours, theirs in _components(pairs, shared):
            where = [i for i, (a, b) in enumerate(pairs) if a.set in ours or b.set in theirs]
            operands = []
            for side, (label, sets) in enumerate(((one, ours), (other, theirs))):
                for s in sets:
                    factors = tuple(pairs[i][side].within(s) for i in where)
                    # Parts of a set are distinguished: different operations may have changed them.
                    constant = int(side == 1 and (not symmetric or s in ours))
                    operands.append(Operand(s, factors, label.start.get(s, 0), constant))
            if symmetric and len({(o.set, o.factors, o.start) for o in operands}) == 1:
                continue
            sizes = [pairs[i][0].size for i in where]
            target = self._merge_set(operands, sizes, kind)
            for i, factor in zip(where, row_major(sizes, target), strict=True):
                answer[i] = factor
            start.pop(target, None)
        axes = [
            coalesced([factor for at, factor in zip(axis_of, answer, strict=True) if at == axis])
            for axis in range(len(shape))
        ]
        return Label(tuple(axes), start).pruned()

    def _with_places(self, a: Factor, b: Factor) -> tuple[Factor, Factor]:
        """Turn varying data at the place of neurons into inputs."""
        if a.set is None and b.set is not None and not a.is_expanded:
            a = Factor(a.size, self.builder.new_inputs("places", a.size), 1)
        elif b.set is None and a.set is not None and not b.is_expanded:
            b = Factor(b.size, self.builder.new_inputs("places", b.size), 1)
        return a, b

    def _merge_set(self, operands: list[Operand], sizes: list[int], kind: str) -> int:
        """Return a set with a neuron for each entry, connected to all operands."""
        size, target = math.prod(sizes), None
        if kind == "sum":  # a fresh set can take the others in
            for one in reversed(operands):
                found, others = self.builder.sets[one.set], [o.set for o in operands if o != one]
                is_whole = list(one.factors) == row_major(sizes, one.set) and one.start == 0
                # Not if it has taken in another part of the same set: both would look the same.
                is_taken = any(self.builder.is_connected(s, one.set) for s in others)
                is_free = found.fresh and found.role == "hidden" and not is_taken
                if is_free and is_whole and found.size == size:
                    target = one.set
                    break
        if target is None:
            target = self.builder.new_merge(kind, size)
        for one in operands:
            if one.set != target:
                large, starts = row_major(sizes, target), (0, one.start)
                self.builder.connect(large, one.factors, starts, True, kind, one.constant)
        self.builder.sets[target].fresh = True
        return target

    def reduce(self, label: Label, gone: Sequence[int], kind: str = "mean") -> Label:
        """Follow a reduction over axes, which keep size 1."""
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
            self.builder.connect(large, small, (start.get(s, 0), 0), False, kind)
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
            if len(sizes) == len(found):
                self.builder.fix_order([s])
            else:
                self.builder.connect(large, small, (start, 0), True, "places")
        reduced = self.reduce(label, axes, "map")
        for i in axes:
            reduced = reduced.with_axis(i, (Factor(label.shape[i]),))
        return reduced.pruned()

    def mixed(self, label: Label, axes: Sequence[int]) -> Label:
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
        if len(self.builder.sets) == sets_before:
            self.builder.fix_order(apart)
            return label
        return self.combine(label, shared, label.shape, "sum")

    def contract(self, one: Label, other: Label) -> Label:
        """Follow a matrix product, (..., i, k) (..., k, j) -> (..., i, j)."""
        left = Label((*one.axes, ()), one.start)
        right = Label((*other.axes[:-2], (), *other.axes[-2:]), other.start)
        batch = torch.broadcast_shapes(one.shape[:-2], other.shape[:-2])
        shape = (*batch, *one.shape[-2:], other.shape[-1])
        met = self.combine(left, right, shape, "product", symmetric=False)
        summed = self.reduce(met, [-2], "sum")
        return Label((*summed.axes[:-2], summed.axes[-1]), summed.start)


def _components(
    pairs: Sequence[tuple[Factor, Factor]], shared: Iterable[int]
) -> list[tuple[set[int], set[int]]]:
    """Return connected components of the sets of two tensors that share a factor or are equal."""
    groups: list[tuple[set[int], set[int]]] = []
    sets = [(a.set, b.set) for a, b in pairs if a.set is not None and b.set is not None]
    for a, b in (*sets, *((s, s) for s in shared)):
        ours, theirs, apart = {a}, {b}, []
        for group in groups:
            if group[0] & ours or group[1] & theirs:
                ours |= group[0]
                theirs |= group[1]
            else:
                apart.append(group)
        groups = [*apart, (ours, theirs)]
    return groups
