"""Labels of tensors: whether an axis enumerates neurons or data (examples, pixels, tokens).

An axis is a product of factors, outermost first. After a feature map of 256 channels and 3 pixels
is flattened, its axis of 768 entries has the factors 256 channels and 3 pixels. The 12 heads of
attention and the 64 entries of each head are two factors of one set of 768 neurons. Every view of a
tensor only splits, merges and reorders factors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


class NotFollowed(Exception):
    """Error for an operation that cannot be followed: neurons that it reads keep their order."""


def require(condition: bool) -> None:
    """Raise NotFollowed unless a condition for following an operation holds."""
    if not condition:
        raise NotFollowed


@dataclass(frozen=True, slots=True)
class Factor:
    """Factor of an axis.

    Attributes:
        size: Number of steps.
        set: Index of the set of neurons that it enumerates; None for data.
        stride: Number of neurons per step; for data 0, or negative if all steps hold the same
            values, as along an axis from ``expand``.
    """

    size: int
    set: int | None = None
    stride: int = 0

    @property
    def is_expanded(self) -> bool:
        """Whether it is data with the same values at each step."""
        return self.set is None and self.stride < 0

    def split(self, inner: int) -> tuple["Factor", "Factor"]:
        """Split into an outer and an inner factor, the inner one of the given size."""
        outer = Factor(self.size // inner, self.set, self.stride * inner)
        return outer, Factor(inner, self.set, self.stride)

    def within(self, s: int) -> "Factor":
        """Return the factor if it enumerates a set, else one of data."""
        return self if self.set == s else Factor(self.size)


Axis = tuple[Factor, ...]


@dataclass(frozen=True, slots=True)
class Label:
    """Meaning of a tensor's entries.

    Attributes:
        axes: Factors of each axis.
        start: Index of the neuron of the tensor's first entry, by set; 0 for sets without one.
    """

    axes: tuple[Axis, ...]
    start: dict[int, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(math.prod(f.size for f in axis) for axis in self.axes)

    def sets(self) -> list[int]:
        """Return the sets that its axes enumerate, in the order of the axes."""
        return list(dict.fromkeys(f.set for axis in self.axes for f in axis if f.set is not None))

    def with_axis(self, axis: int, factors: Axis) -> "Label":
        """Return the label with one axis replaced."""
        axes = list(self.axes)
        axes[axis] = factors
        return replace(self, axes=tuple(axes))

    def drop_axes(self, axes: Sequence[int]) -> "Label":
        """Return the label with some axes removed, given by non-negative numbers."""
        return replace(self, axes=tuple(a for i, a in enumerate(self.axes) if i not in axes))

    def pruned(self) -> "Label":
        """Return the label without starts of sets that no axis enumerates."""
        known = self.sets()
        return Label(self.axes, {s: at for s, at in self.start.items() if s in known and at})


def data(shape: Sequence[int]) -> Label:
    """Return the label of a tensor without neurons."""
    return Label(tuple(coalesced((Factor(size),)) for size in shape))


def expanded(size: int) -> Factor:
    """Return a factor of data with the same values at each step."""
    return Factor(size, None, -1)


def coalesced(factors: Sequence[Factor]) -> Axis:
    """Merge adjacent factors of an axis where possible."""
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


def refined(one: Axis, other: Axis) -> tuple[Axis, Axis]:
    """Split two axes of equal length into factors of equal sizes."""
    ours, theirs = list(one), list(other)
    answer: tuple[list[Factor], list[Factor]] = ([], [])
    while ours and theirs:
        a, b = ours.pop(), theirs.pop()  # innermost first
        inner = min(a.size, b.size)
        require(a.size % inner == b.size % inner == 0)
        if a.size > inner:
            outer, a = a.split(inner)
            ours.append(outer)
        if b.size > inner:
            outer, b = b.split(inner)
            theirs.append(outer)
        answer[0].append(a)
        answer[1].append(b)
    rest = [*ours, *theirs]
    require(all(f.size <= 1 for f in rest))
    for factor in rest[::-1]:  # factors of size 1
        answer[0].append(factor if ours else expanded(1))
        answer[1].append(expanded(1) if ours else factor)
    return tuple(answer[0][::-1]), tuple(answer[1][::-1])


def view_label(label: Label, view: torch.Tensor) -> Label:
    """Return the label of a view of a labelled tensor.

    Args:
        label: Label of the tensor.
        view: The same view of a contiguous tensor of the label's shape, at the start of its
            storage. Only its shape, strides and offset are used.
    """
    factors = [f for axis in label.axes for f in axis]
    weights = [math.prod(f.size for f in factors[i + 1 :]) for i in range(len(factors))]
    axes = [
        coalesced(_view_axis(factors, weights, size, stride))
        for size, stride in zip(view.shape, view.stride(), strict=True)
    ]
    start, offset = dict(label.start), int(view.storage_offset())
    for factor, weight in zip(factors, weights, strict=True):
        digit, offset = divmod(offset, weight)
        if factor.set is not None and digit:
            start[factor.set] = start.get(factor.set, 0) + digit * factor.stride
    return Label(tuple(axes), start).pruned()


def _view_axis(
    factors: Sequence[Factor], weights: Sequence[int], size: int, stride: int
) -> list[Factor]:
    """Return the factors along an axis of a view.

    ``weights`` are the strides of the factors in the contiguous tensor.
    """
    if size == 1 or stride == 0:
        return [expanded(size)]
    answer: list[Factor] = []
    while size > 1:
        i = next((i for i, w in enumerate(weights) if w <= stride and factors[i].size > 1), None)
        if i is None or stride % weights[i] or stride >= weights[i] * factors[i].size:
            raise NotFollowed
        step = stride // weights[i]
        whole = factors[i].size // step  # steps before the next outer factor
        steps = min(size, whole)
        require(size == steps or size % steps == factors[i].size % step == 0)
        answer.insert(0, Factor(steps, factors[i].set, factors[i].stride * step))
        size, stride = size // steps, stride * steps
    return answer


def broadcast(label: Label, shape: Sequence[int]) -> Label:
    """Return the label of a tensor that is expanded to a shape."""
    axes: list[Axis] = []
    for i, n in enumerate(shape, len(label.axes) - len(shape)):
        has_axis = i >= 0 and label.shape[i] == n
        axes.append(coalesced(label.axes[i] if has_axis else [expanded(n)]))
    return Label(tuple(axes), label.start).pruned()


def as_varying(label: Label, axes: Sequence[int]) -> Label:
    """Return the label with expanded data along some axes turned into varying data."""
    for axis in axes:
        factors = tuple(Factor(f.size) if f.is_expanded else f for f in label.axes[axis])
        label = label.with_axis(axis % len(label.axes), factors)
    return label


def sole_factor(label: Label, axis: int) -> Factor | None:
    """Return the factor of an axis if it is the only one of its axis and of its set, else None."""
    if len(label.axes[axis]) != 1 or label.axes[axis][0].set is None:
        return None
    (factor,) = label.axes[axis]
    others = [f.set for i, a in enumerate(label.axes) if i != axis % len(label.axes) for f in a]
    return None if factor.set in others else factor
