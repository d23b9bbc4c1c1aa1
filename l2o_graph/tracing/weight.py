"""Views of parameters, and tensors that are computed from parameters elementwise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Weight:
    """View of a parameter in contiguous layout, or a tensor computed from it elementwise.

    Attributes:
        parameter: Index of the parameter.
        start: Index of the first scalar in the flattened parameter.
        shape: Shape of the view.
        strides: Strides, in scalars; 0 along expanded axes.
        masked: Whether constants, such as a mask, distinguish the neurons on both sides.
    """

    parameter: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    masked: bool = False

    @property
    def axes(self) -> tuple[tuple[int, int], ...]:
        """Size and stride of each axis."""
        return tuple(zip(self.shape, self.strides, strict=True))

    @property
    def dense(self) -> bool:
        """Whether the view is contiguous."""
        expected = 1
        for size, stride in reversed(self.axes):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def solid(self) -> bool:
        """Whether the view is contiguous apart from expanded axes."""
        kept = [(n, step) for n, step in self.axes if step]
        shape, strides = tuple(n for n, _ in kept), tuple(step for _, step in kept)
        return replace(self, shape=shape, strides=strides).dense

    def broadcast(self, shape: Sequence[int], axis: int | None = None) -> "Weight | None":
        """Return the weight expanded to a shape; None if the shapes are incompatible.

        ``axis`` is the axis of the shape that the first axis of the weight is aligned with; None
        aligns the last axes.
        """
        before = len(shape) - len(self.shape) if axis is None else axis
        behind = len(shape) - len(self.shape) - before
        if before < 0 or behind < 0:
            return None
        own = (*(1,) * before, *self.shape, *(1,) * behind)
        steps = (*(0,) * before, *self.strides, *(0,) * behind)
        if any(n not in (1, m) for n, m in zip(own, shape, strict=True)):
            return None
        strides = tuple(
            0 if n == 1 < m else step for n, m, step in zip(own, shape, steps, strict=True)
        )
        return replace(self, shape=tuple(shape), strides=strides)

    def transposed(self, i: int = 0, j: int = 1) -> "Weight":
        """Return the weight with two axes exchanged."""
        order = list(range(len(self.shape)))
        order[i], order[j] = j, i
        shape, strides = (tuple(each[n] for n in order) for each in (self.shape, self.strides))
        return replace(self, shape=shape, strides=strides)
