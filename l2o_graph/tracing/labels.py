"""What the axes of a tensor enumerate: neurons of some set, or data (examples, pixels, tokens).

An axis is a product of factors, outermost first: the 768 entries behind a flattened map of 3 x 256
are 256 channels times 3 pixels, the 12 heads of an attention and the 64 entries of each are two
factors of one set of 768 neurons. Every view of a tensor then only cuts, joins and reorders them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True, slots=True)
class Factor:
    """``size`` steps along an axis.

    Attributes:
        set: Index of the set of neurons that they run through; None for data.
        stride: Neurons from one step to the next; for data 0, or below 0 where all are alike, as
            those of an expanded axis.
    """

    size: int
    set: int | None = None
    stride: int = 0

    @property
    def alike(self) -> bool:
        """Whether it is data that is the same at each step."""
        return self.set is None and self.stride < 0

    def cut(self, inner: int) -> tuple["Factor", "Factor"]:
        """An outer and an inner factor, the inner of a given size."""
        outer = Factor(self.size // inner, self.set, self.stride * inner)
        return outer, Factor(inner, self.set, self.stride)


Axis = tuple[Factor, ...]


@dataclass(frozen=True, slots=True)
class Label:
    """What a tensor's entries are: factors of each axis.

    ``start`` is the neuron of each set that the first entry belongs to, where not 0.
    """

    axes: tuple[Axis, ...]
    start: dict[int, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(math.prod(f.size for f in axis) for axis in self.axes)

    def sets(self) -> list[int]:
        """The sets that any axis runs through, in order."""
        return list(dict.fromkeys(f.set for axis in self.axes for f in axis if f.set is not None))

    def with_axis(self, axis: int, factors: Axis) -> "Label":
        """Another axis in the place of one."""
        axes = list(self.axes)
        axes[axis] = factors
        return replace(self, axes=tuple(axes))

    def without(self, axes: Sequence[int]) -> "Label":
        """Only the other axes."""
        return replace(self, axes=tuple(a for i, a in enumerate(self.axes) if i not in axes))

    def only(self) -> "Label":
        """Without the starts of sets that no axis runs through."""
        known = self.sets()
        return Label(self.axes, {s: at for s, at in self.start.items() if s in known and at})


def data(shape: Sequence[int]) -> Label:
    """A tensor without neurons."""
    return Label(tuple(joined((Factor(size),)) for size in shape))


def alike(size: int) -> Factor:
    """Data that is the same at each step."""
    return Factor(size, None, -1)


def joined(factors: Sequence[Factor]) -> Axis:
    """The same axis in as few factors as possible."""
    answer: list[Factor] = []
    for factor in factors:
        if factor.size == 1 and factor.set is None:
            continue
        if answer:
            last = answer[-1]
            if last.set == factor.set and last.stride == factor.stride * factor.size:
                answer[-1] = Factor(last.size * factor.size, factor.set, factor.stride)
                continue
        answer.append(factor)
    return tuple(answer)


def refined(one: Axis, other: Axis) -> tuple[Axis, Axis] | None:
    """Two axes of one length in factors of the same sizes; None where their cuts cross."""
    ours, theirs = list(one), list(other)
    answer: tuple[list[Factor], list[Factor]] = ([], [])
    while ours and theirs:
        a, b = ours.pop(), theirs.pop()  # innermost first
        inner = min(a.size, b.size)
        if a.size % inner or b.size % inner:
            return None
        if a.size > inner:
            outer, a = a.cut(inner)
            ours.append(outer)
        if b.size > inner:
            outer, b = b.cut(inner)
            theirs.append(outer)
        answer[0].append(a)
        answer[1].append(b)
    rest = [*ours, *theirs]
    if any(f.size > 1 for f in rest):
        return None
    for factor in rest[::-1]:  # steps that are none
        answer[0].append(factor if ours else alike(1))
        answer[1].append(alike(1) if ours else factor)
    return tuple(answer[0][::-1]), tuple(answer[1][::-1])


def viewed(label: Label, view: torch.Tensor) -> Label | None:
    """The label of a view, told by its strides over a contiguous tensor of the label's shape.

    ``view`` is the same view of a stand-in whose storage begins with that tensor. None where an
    axis runs across factors in steps that fit neither.
    """
    factors = [f for axis in label.axes for f in axis]
    weights = [math.prod(f.size for f in factors[i + 1 :]) for i in range(len(factors))]
    axes = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        axis = _axis(factors, weights, size, stride)
        if axis is None:
            return None
        axes.append(joined(axis))
    start, offset = dict(label.start), int(view.storage_offset())
    for factor, weight in zip(factors, weights, strict=True):
        digit, offset = divmod(offset, weight)
        if factor.set is not None and digit:
            start[factor.set] = start.get(factor.set, 0) + digit * factor.stride
    return Label(tuple(axes), start).only()


def _axis(
    factors: Sequence[Factor], weights: Sequence[int], size: int, stride: int
) -> list[Factor] | None:
    """The factors that an axis of a view runs through."""
    if size == 1 or stride == 0:
        return [alike(size)]
    answer: list[Factor] = []
    while size > 1:
        i = next((i for i, w in enumerate(weights) if w <= stride and factors[i].size > 1), None)
        if i is None or stride % weights[i] or stride >= weights[i] * factors[i].size:
            return None
        step = stride // weights[i]
        whole = factors[i].size // step  # steps until the next outer factor is reached
        steps = min(size, whole)
        if size > steps and (size % steps or factors[i].size % step):
            return None
        answer.insert(0, Factor(steps, factors[i].set, factors[i].stride * step))
        size, stride = size // steps, stride * steps
    return answer


def told_apart(label: Label, axes: Sequence[int]) -> Label:
    """The same label where data that was alike along some axes is so no more."""
    for axis in axes:
        factors = tuple(Factor(f.size) if f.alike else f for f in label.axes[axis])
        label = label.with_axis(axis % len(label.axes), factors)
    return label


def sole_factor(label: Label, axis: int) -> Factor | None:
    """The neurons along an axis, where they are one run of a set that runs along no other."""
    if len(label.axes[axis]) != 1 or label.axes[axis][0].set is None:
        return None
    (factor,) = label.axes[axis]
    others = [f.set for i, a in enumerate(label.axes) if i != axis % len(label.axes) for f in a]
    return None if factor.set in others else factor
