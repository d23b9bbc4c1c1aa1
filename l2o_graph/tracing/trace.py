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
from l2o_graph.tracing.labels import Axis, Factor, Label, broadcast, coalesced, expanded, refined
from l2o_graph.tracing.layers import Layers


class Trace(Layers):
    """Trace of a computation, with the operations that rules for layers are made of."""

    def cat(self, tensors: Sequence[Tensor], axis: int, out: Tensor) -> Label | None:
        """Follow a concatenation along an axis; return None for data, which needs no label."""
        axis %= out.dim()
        tensors = [t for t in tensors if t.dim() == out.dim() and t.numel()]
        labels = [self.label(t) for t in tensors]
        if not any(label.sets() for label in labels):
            pieces = [(t.shape[axis], self.is_exchangeable(t)) for t in tensors]
            put = any(exchangeable for _, exchangeable in pieces)
            self.pieces.put(out, {axis: pieces} if put else None)
            return None
        aligned = _align(labels, axis)
        along = any(f.set is not None for label in labels for f in label.axes[axis])
        shared = _concatenated_factors(labels, aligned, axis)
        target = None
        if along:
            target = self._concatenate(tensors, labels, aligned, shared, axis, out.shape[axis])
        # Neurons along other axes are combined as in a sum.
        rest = []
        for t, label, axes in zip(tensors, labels, aligned, strict=True):
            kept = [
                tuple(expanded(f.size) if (i, j) in shared else f for j, f in enumerate(factors))
                for i, factors in enumerate(axes)
            ]
            one = Label(tuple(kept), label.start) if label.sets() else self.operand(t)
            rest.append(one.with_axis(axis, ()).pruned())
        shape = [1 if i == axis else n for i, n in enumerate(out.shape)]
        first = next((i for i, label in enumerate(rest) if label.sets()), 0)
        answer = broadcast(rest[first], shape)
        for label in (*rest[:first], *rest[first + 1 :]):
            answer = self.combine(answer, label, shape, "sum")
        if target is None:
            for t in tensors:
                if self.is_weight(t):
                    answer = self.add_parameter(answer, t)
            return answer.with_axis(axis, (Factor(out.shape[axis]),))
        *outer, own = row_major(
            [*(aligned[0][i][j].size for i, j in shared), out.shape[axis]], target
        )
        for (i, j), factor in zip(shared, outer, strict=True):
            factors, _ = refined(answer.axes[i] or (expanded(1),), aligned[0][i])
            answer = answer.with_axis(i, (*factors[:j], factor, *factors[j + 1 :]))
        axes = [(own,) if i == axis else coalesced(a) for i, a in enumerate(answer.axes)]
        return Label(tuple(axes), answer.start).pruned()

    def _concatenate(
        self, tensors: Sequence[Tensor], labels: Sequence[Label],
        aligned: Sequence[Sequence[Axis]], shared: Sequence[tuple[int, int]], axis: int, size: int,
    ) -> int:  # fmt: skip
        """Connect concatenated neurons to a new set, of ``size`` along the axis, and return it.

        ``aligned`` has the other axes of each tensor in factors of equal sizes, and ``shared`` the
        factors (axis, number) of those that enumerate neurons of the new set, too.
        """
        outer = [aligned[0][i][j].size for i, j in shared]
        target = self.builder.new_merge("concatenation", math.prod(outer) * size)
        numbers = row_major([*outer, size], target)[:-1]
        # Pieces with the same neurons are distinguished by an input for each piece.
        sets = [
            {f.set for f in (*label.axes[axis], *(axes[i][j] for i, j in shared))} - {None}
            for label, axes in zip(labels, aligned, strict=True)
        ]
        is_shared = any(a & b for a, b in itertools.combinations(sets, 2))
        places = self.builder.new_inputs("pieces", len(tensors)) if is_shared else None
        at = 0
        for n, (label, axes, t) in enumerate(zip(labels, aligned, tensors, strict=True)):
            width = t.shape[axis]
            factors = [*(axes[i][j] for i, j in shared), *(label.axes[axis] or (expanded(width),))]
            if not label.sets():
                no_order = self.is_exchangeable(t) or self.weights(t)
                factors = [*(expanded(m) if no_order else Factor(m) for m in outer), Factor(width)]
            inner = row_major([f.size for f in factors[len(outer) :]], target)
            large = [*numbers, *inner]
            self.builder.copy(label, factors, large, at, "concatenation")
            if places is not None:
                there = [Factor(f.size, places) for f in large]
                self.builder.connect(large, there, (at, n), True, "pieces")
            at += width
        self.builder.sets[target].fresh = True
        return target

    def set_activation(self, label: Label, activation: str) -> None:
        """Record the activation of neurons."""
        for s in label.sets():
            found = self.builder.sets[s]
            found.activation = found.activation or activation
            found.fresh = False


def _align(labels: Sequence[Label], axis: int) -> list[list[Axis]]:
    """Split all axes but one into factors of equal sizes; that one becomes ()."""
    answer: list[list[Axis]] = [[()] * len(label.axes) for label in labels]
    for i in {*range(len(labels[0].axes))} - {axis}:
        own = [label.axes[i] or (expanded(1),) for label in labels]
        common = own[0]
        for other in own[1:]:
            common, _ = refined(common, other)
        for each, factors in zip(answer, own, strict=True):
            each[i], _ = refined(factors, common)
    return answer


def _concatenated_factors(
    labels: Sequence[Label], aligned: Sequence[Sequence[Axis]], axis: int
) -> list[tuple[int, int]]:
    """Return the factors (axis, number) of sets along ``axis``, or connected to such a set."""
    sets = {f.set for label in labels for f in label.axes[axis]} - {None}
    places = [(i, j) for i, factors in enumerate(aligned[0]) for j in range(len(factors))]
    known: list[tuple[int, int]] = []
    while True:
        found = [(i, j) for i, j in places if any(each[i][j].set in sets for each in aligned)]
        if len(found) == len(known):
            return found
        known = found
        sets |= {each[i][j].set for each in aligned for i, j in found} - {None}
