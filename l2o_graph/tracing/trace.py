"""A network's computation, followed operation by operation.

Neurons are what the entries along an axis of a tensor stand for. A parameter that maps one axis to
another joins their neurons; wherever neurons meet otherwise, in a sum, a product, a concatenation
or a mean over some of them, new neurons are joined to them by edges of the constant 1. Nothing
more is needed for residual additions, gates, attention and its heads: their symmetries are those
of the graph.
"""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from l2o_graph.tracing.builder import numbered
from l2o_graph.tracing.labels import (
    Axis,
    Factor,
    Label,
    alike,
    data,
    joined,
    refined,
)
from l2o_graph.tracing.layers import Layers


class Trace(Layers):
    """What is known of every tensor so far, and what a rule for a layer may say of its output."""

    def cat(self, tensors: Sequence[Tensor], axis: int, out: Tensor) -> Label | None:
        """Tensors one after the other along an axis."""
        axis %= out.dim()
        tensors = [t for t in tensors if t.dim() == out.dim() and t.numel()]
        labels = [self.label(t) for t in tensors]
        if not any(label.sets() for label in labels):
            pieces = [(t.shape[axis], self.is_even(t)) for t in tensors]
            self.pieces.put(out, {axis: pieces} if any(even for _, even in pieces) else None)
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
        answer: Label | None = self.combine(rest[first], data((1,) * out.dim()), shape, "sum")
        for label in (*rest[:first], *rest[first + 1 :]):
            answer = answer and self.combine(answer, label, shape, "sum")
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
        """A set of neurons for tensors one after the other along an axis, of ``size`` in the end.

        ``among`` are the other axes of each, in factors of the same sizes, and ``taken`` says which
        of those (axis, number) the set runs through as well. None where it cannot be.
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
        places = self.builder.ordered("pieces", len(tensors)) if told else None
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
            if told and not self.builder.connect(large, there, (at, n), True, "pieces"):
                return None
            at += width
        self.builder.sets[target].fresh = True
        return target

    def activated(self, label: Label, activation: str) -> None:
        """Say what nonlinearity neurons have."""
        for s in label.sets():
            found = self.builder.sets[s]
            found.activation = found.activation or activation
            found.fresh = False


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
