"""Trace of a network's computation: its graph, built operation by operation.

Entries along an axis of a tensor are neurons. A parameter that maps one axis to another connects
their neurons. In a sum, a product, a concatenation or a partial mean, new neurons are connected to
the operands by edges of a constant. This covers residual additions, gates and multi-head attention:
their symmetries are the automorphisms of the graph.
"""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from l2o_graph.tracing.builder import row_major
from l2o_graph.tracing.labels import (
    Axis,
    Factor,
    Label,
    coalesced,
    data,
    expanded,
    refined,
)
from l2o_graph.tracing.layers import Layers


class Trace(Layers):
    """Trace of a computation, with the operations that rules for layers are made of."""

    def cat(self, tensors: Sequence[Tensor], axis: int, out: Tensor) -> Label | None:
        """Follow a concatenation along an axis; None if it cannot be followed."""
        axis %= out.dim()
        tensors = [t for t in tensors if t.dim() == out.dim() and t.numel()]
        labels = [self.label(t) for t in tensors]
        if not any(label.sets() for label in labels):
            pieces = [(t.shape[axis], self.is_exchangeable(t)) for t in tensors]
            self.pieces.put(out, {axis: pieces} if any(even for _, even in pieces) else None)
            return None
        among = _align(labels, axis)
        if among is None:
            return None
        along = any(f.set is not None for label in labels for f in label.axes[axis])
        taken = _concatenated_factors(labels, among, axis)
        target = None
        if along:
            target = self._concatenate(tensors, labels, among, taken, axis, out.shape[axis])
            if target is None:
                return None
        # Neurons along other axes are combined as in a sum.
        rest = []
        for t, label, axes in zip(tensors, labels, among, strict=True):
            kept = [
                tuple(expanded(f.size) if (i, j) in taken else f for j, f in enumerate(factors))
                for i, factors in enumerate(axes)
            ]
            one = Label(tuple(kept), label.start) if label.sets() else self.operand(t)
            rest.append(one.with_axis(axis, ()).pruned())
        shape = [1 if i == axis else n for i, n in enumerate(out.shape)]
        first = next((i for i, label in enumerate(rest) if label.sets()), 0)
        answer: Label | None = self.combine(rest[first], data((1,) * out.dim()), shape, "sum")
        for label in (*rest[:first], *rest[first + 1 :]):
            answer = answer and self.combine(answer, label, shape, "sum")
        for t in tensors:
            if answer is not None and target is None and self.is_weight(t):
                answer = self.add_parameter(answer, t)
        if answer is None or target is None:
            return answer and answer.with_axis(axis, (Factor(out.shape[axis]),))
        *outer, own = row_major([*(among[0][i][j].size for i, j in taken), out.shape[axis]], target)
        for (i, j), factor in zip(taken, outer, strict=True):
            both = refined(answer.axes[i] or (expanded(1),), among[0][i])
            if both is None:
                return None
            factors = (*both[0][:j], factor, *both[0][j + 1 :])
            answer = Label((*answer.axes[:i], factors, *answer.axes[i + 1 :]), answer.start)
        axes = [(own,) if i == axis else coalesced(a) for i, a in enumerate(answer.axes)]
        return Label(tuple(axes), answer.start).pruned()

    def _concatenate(
        self, tensors: Sequence[Tensor], labels: Sequence[Label],
        among: Sequence[Sequence[Axis]], taken: Sequence[tuple[int, int]], axis: int, size: int,
    ) -> int | None:  # fmt: skip
        """Connect concatenated neurons to a new set; return it, or None if that is not possible.

        Args:
            tensors: Tensors to concatenate.
            labels: Their labels.
            among: Other axes of each, in factors of equal sizes.
            taken: Factors (axis, number) of those that enumerate neurons of the new set, too.
            axis: Axis of the concatenation.
            size: Size of the result along it.
        """
        outer = [among[0][i][j].size for i, j in taken]
        target = self.builder.new_merge("concatenation", math.prod(outer) * size)
        numbers = row_major([*outer, size], target)[:-1]
        # Pieces with the same neurons are distinguished by an input for each piece.
        sets = [
            {f.set for f in (*label.axes[axis], *(axes[i][j] for i, j in taken))} - {None}
            for label, axes in zip(labels, among, strict=True)
        ]
        told = any(a & b for a, b in itertools.combinations(sets, 2))
        places = self.builder.new_inputs("pieces", len(tensors)) if told else None
        at = 0
        for n, (label, axes, t) in enumerate(zip(labels, among, tensors, strict=True)):
            width = t.shape[axis]
            factors = [*(axes[i][j] for i, j in taken), *(label.axes[axis] or (expanded(width),))]
            if not label.sets():
                no_order = self.is_exchangeable(t) or self.weights(t)
                factors = [*(expanded(m) if no_order else Factor(m) for m in outer), Factor(width)]
            inner = row_major([f.size for f in factors[len(outer) :]], target)
            large = [*numbers, *inner]
            if not self.builder.copy(label, factors, large, at, "concatenation"):
                return None
            there = [Factor(f.size, places) for f in large]
            if told and not self.builder.connect(large, there, (at, n), True, "pieces"):
                return None
            at += width
        self.builder.sets[target].fresh = True
        return target

    def set_activation(self, label: Label, activation: str) -> None:
        """Record the activation of neurons."""
        for s in label.sets():
            found = self.builder.sets[s]
            found.activation = found.activation or activation
            found.fresh = False


def _align(labels: Sequence[Label], axis: int) -> list[list[Axis]] | None:
    """Split all axes but one into factors of equal sizes; None if factors overlap."""
    answer: list[list[Axis]] = [[()] * len(label.axes) for label in labels]
    for i in range(len(labels[0].axes)):
        own = [label.axes[i] or (expanded(1),) for label in labels]
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


def _concatenated_factors(
    labels: Sequence[Label], among: Sequence[Sequence[Axis]], axis: int
) -> list[tuple[int, int]]:
    """Return the factors (axis, number) of sets along ``axis``, or connected to such a set."""
    sets = {f.set for label in labels for f in label.axes[axis]} - {None}
    places = [(i, j) for i, factors in enumerate(among[0]) for j in range(len(factors))]
    known: list[tuple[int, int]] = []
    while True:
        found = [(i, j) for i, j in places if any(each[i][j].set in sets for each in among)]
        if len(found) == len(known):
            return found
        known = found
        sets |= {each[i][j].set for each in among for i, j in found} - {None}
