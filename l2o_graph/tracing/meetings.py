"""Neurons that meet without a parameter: in a sum, a product, a mean over some of them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from l2o_graph.tracing.builder import numbered
from l2o_graph.tracing.known import Known
from l2o_graph.tracing.labels import Axis, Factor, Label, alike, data, joined, refined


@dataclass(frozen=True, slots=True)
class Operand:
    """Neurons of one set on their way to a meeting, from neuron ``start`` on.

    ``factors`` say how they run through the set, those without it being places where one neuron
    serves; ``constant`` which of the ``CONSTANTS`` their edges carry.
    """

    set: int
    factors: tuple[Factor, ...]
    start: int
    constant: int


class Meetings(Known):
    """Neurons of several sets, or of one, put together by edges of the constants."""

    def combine(
        self, one: Label, other: Label, shape: Sequence[int], kind: str, alike: bool = True
    ) -> Label | None:
        """Entries of two tensors that come together, after broadcasting to a shape.

        ``kind`` says what brings them together, ``alike`` whether it would be the same with the two
        exchanged.
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
                    Operand(s, tuple(_of(factors[i], s) for i in where), label.start.get(s, 0), 0)
                    for s in sets
                ]
                for factors, label, sets in (
                    ([a for _, a, _ in places], one, ours),
                    ([b for _, _, b in places], other, theirs),
                )
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
            a = Factor(a.size, self.builder.ordered("places", a.size), 1)
        elif b.set is None and a.set is not None and not b.alike:
            b = Factor(b.size, self.builder.ordered("places", b.size), 1)
        return axis, a, b

    def _meeting_place(self, sides: list["Operand"], sizes: list[int], kind: str) -> int | None:
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
            if side.set != target and not self.builder.connect(
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
                self.builder.mark_read(s)
                if math.prod(f.size for _, f in places) < self.builder.sets[s].size:
                    self.builder.lose([s])  # the sum tells these neurons from the others
            if len(kept) == len(places) or not kept:
                continue
            target = self.builder.new_meeting(kind, math.prod(kept))
            stays = iter(numbered(kept, target))
            small = [Factor(f.size) if i in lost else next(stays) for i, f in places]
            large = [f for _, f in places]
            if not self.builder.connect(large, small, (start.get(s, 0), 0), False, kind):
                return None
            self.builder.sets[target].fresh = True
            stays = iter(numbered(kept, target))
            axes = [tuple(next(stays) if f.set == s else f for f in axis) for axis in axes]
        return Label(tuple(axes), start).only()

    def as_places(self, label: Label, axes: Sequence[int]) -> Label:
        """The same tensor where the neurons along some axes are places of those along others.

        As of a vector that becomes a map: what reads it knows each place, alike for all channels.
        """
        for s in label.sets():
            found = [(i, f) for i, axis in enumerate(label.axes) for f in axis if f.set == s]
            sizes = [f.size for i, f in found if i in axes]
            if not sizes:
                continue
            places = iter(numbered(sizes, self.builder.ordered("places", math.prod(sizes))))
            small = [next(places) if i in axes else Factor(f.size) for i, f in found]
            large, start = [f for _, f in found], label.start.get(s, 0)
            if len(sizes) == len(found) or not self.builder.connect(
                large, small, (start, 0), True, "places"
            ):
                self.builder.lose([s])
        reduced = self.reduce(label, axes, "map")
        if reduced is None:
            self.builder.lose(label.sets())
            return data(label.shape)
        for i in axes:
            reduced = reduced.with_axis(i, (Factor(label.shape[i]),))
        return reduced.only()

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
        return self.combine(label, shared, label.shape, "sum")

    def contract(self, one: Label, other: Label) -> Label | None:
        """A product of matrices, (..., i, k) and (..., k, j)."""
        left = Label((*one.axes, ()), one.start)
        right = Label((*other.axes[:-2], (), *other.axes[-2:]), other.start)
        batch = torch.broadcast_shapes(one.shape[:-2], other.shape[:-2])
        shape = (*batch, *one.shape[-2:], other.shape[-1])
        met = self.combine(left, right, shape, "product", alike=False)
        if met is None:
            return None
        summed = self.reduce(met, [-2], "sum")
        if summed is None:
            return None
        return Label((*summed.axes[:-2], summed.axes[-1]), summed.start)


def _of(factor: Factor, s: int) -> Factor:
    """A factor as a set sees it: without steps where it does not run through it."""
    return factor if factor.set == s else Factor(factor.size)


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
