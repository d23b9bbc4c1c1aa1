"""What is known of every tensor of a computation so far: what it stands for, or is made of."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from l2o_graph.layout.tensors import is_sharded
from l2o_graph.tracing.beside import Beside, pairs_of, span_of, storage_of
from l2o_graph.tracing.builder import Builder, Weight
from l2o_graph.tracing.labels import Label, alike, data


class Known:
    """What is known of every tensor so far, of a network with these parameters by name."""

    def __init__(self, named: Sequence[tuple[str, Tensor]]):
        self.builder = Builder(
            [name for name, _ in named], [() if is_lazy(p) else tuple(p.shape) for _, p in named]
        )
        # Several may be parts of one storage: flattened ones, as cuDNN's LSTMs have them.
        self._of_storage: dict[int | None, list[tuple[int, int, int]]] = {}
        self._strides = [() if is_lazy(p) else tuple(p.stride()) for _, p in named]
        for i, (_, p) in enumerate(named):
            self.place(i, p)
        self._seed = torch.initial_seed()
        self.labels: Beside[Label] = Beside()
        # The parameters that tensors were made of, entry by entry.
        self.derived: Beside[list[Weight]] = Beside()
        # A view of a parameter whose axes were joined to those of the tensor, in any order, and
        # which of its axes each axis of the tensor is.
        self.folded: Beside[tuple[Weight, tuple[tuple[int, ...], ...]]] = Beside()
        self._even: Beside[bool] = Beside()
        # Of what several tensors were put together to, along an axis: sizes, and which are even.
        self.pieces: Beside[dict[int, list[tuple[int, bool]]]] = Beside()
        # Whether entries are sums over parameters, which permute as those do.
        self.statistics: Beside[bool] = Beside()
        # The sets whose order the numbers of a tensor tell, as those of an argmax do.
        self.knows: Beside[set[int]] = Beside()
        self.used: set[int] = set()  # parameters that any operation has read
        self.known_sets: dict[nn.Module, int] = {}  # of layers that are called step by step
        self.is_blind = False  # whether anything was computed with tensors that are sharded
        self.has_nested = False  # or with nested ones

    def place(self, index: int, tensor: Tensor) -> None:
        """Say that a tensor is a parameter, if it is whole and has a shape already."""
        if is_lazy(tensor) or is_sharded(tensor):
            return
        self.builder.shapes[index], self._strides[index] = pairs_of(tensor)
        key = storage_of(tensor)
        if key is not None:
            self._of_storage.setdefault(key, []).append((*span_of(tensor), index))

    def meets_nested(self, found: Any) -> bool:
        """Whether any tensor is a nested one of torch's own kind, which has no axes; notes it."""
        is_nested = any(
            t.is_nested and t.layout == torch.strided
            for t in tree_leaves(found)
            if isinstance(t, Tensor)
        )
        self.has_nested |= is_nested
        return is_nested

    def label(self, tensor: Tensor) -> Label:
        """Of a tensor; data where nothing is known."""
        known = self.labels.get(tensor)
        if known is not None and known.shape == tensor.shape:
            return known
        label = data(tensor.shape)
        for i, (n, stride) in enumerate(zip(*pairs_of(tensor), strict=True)):
            if stride == 0 and n > 1:
                label = label.with_axis(i, (alike(n),))
        return label

    def set_label(self, tensor: Tensor, label: Label | None) -> None:
        """Say what a tensor is."""
        fits = label is not None and label.shape == tuple(tensor.shape)
        self.labels.put(tensor, label if fits else None)

    def sets_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """The sets that run through any of some tensors."""
        return {s for t in tensors for s in self.label(t).sets()}

    def hidden_in(self, tensor: Tensor) -> list[int]:
        """Sets that run through parts of a tensor of which nothing is known as a whole."""
        if self.label(tensor).sets():
            return []
        return [s for _, label in self.labels.sharing(tensor) for s in label.sets()]

    def is_even(self, tensor: Tensor) -> bool:
        """Whether all entries are one number, so that no order of them can be told."""
        return tensor.numel() == 1 or bool(self._even.get(tensor))

    def set_even(self, tensor: Tensor, even: bool) -> None:
        """Say whether all entries of a tensor are one number."""
        self._even.put(tensor, even or None)

    def is_seeded(self, operator: Any, kwargs: dict) -> bool:
        """Whether an operator draws the same random numbers at each call of the network."""
        if torch.Tag.nondeterministic_seeded not in operator.tags:
            return False
        return kwargs.get("generator") is not None or torch.initial_seed() != self._seed

    def uneven(self, tensor: Tensor) -> None:
        """Say that a tensor was written, so that whatever lies in its storage has an order."""
        for where, _ in self._even.sharing(tensor):
            self._even.rewrite(tensor, where, None)
        self._even.drop(tensor)

    def operand(self, tensor: Tensor) -> Label:
        """Of a tensor that meets others: what has no order to tell is as broad as nothing."""
        label = self.label(tensor)
        no_order = self.is_even(tensor) or self.weights(tensor) or not tensor.numel()
        if not label.sets() and no_order:
            return data((1,) * tensor.dim())
        return label

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of parameters, and no neurons run through it."""
        return not self.label(tensor).sets() and bool(self.weights(tensor))

    def weights(self, tensor: Tensor | None) -> list[Weight]:
        """The parameters that a tensor is a view of, or was made of entry by entry."""
        if tensor is None:
            return []
        derived = self.derived.get(tensor)
        if derived is not None:
            return derived
        for first, index in self._place_of(tensor):
            own = self._as_stored(index, first, tensor)
            return [] if own is None else [own]
        return []

    def parameters_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """The parameters that tensors are made of, entry by entry."""
        found = {w.parameter for t in tensors for w in self.weights(t)}
        return found | {f[0].parameter for t in tensors if (f := self.folded.get(t))}

    def use(self, tensor: Tensor) -> None:
        """Note that an operation reads a tensor, which may be a view of a parameter."""
        if tensor.numel() and self.derived.get(tensor) is None:
            self.used.update(index for _, index in self._place_of(tensor))

    def _place_of(self, tensor: Tensor) -> list[tuple[int, int]]:
        """Where a tensor lies: (first scalar, parameter), or nothing."""
        key = storage_of(tensor)
        if key not in self._of_storage:
            return []
        first, last = span_of(tensor)
        inside = ((a, i) for a, b, i in self._of_storage[key] if a <= first and last <= b)
        return [(first - start, index) for start, index in inside][:1]

    def _as_stored(self, index: int, start: int, view: Tensor) -> Weight | None:
        """A view of a parameter as one of the parameter laid out row by row.

        None where the parameter itself is laid out otherwise, as channels_last kernels are, and
        the view does not run along its axes.
        """
        shape, strides = self.builder.shapes[index], self._strides[index]
        here = Weight(index, start, tuple(view.shape), tuple(view.stride()))
        rows = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if Weight(index, 0, shape, strides).dense:
            return here
        steps = {stride: row for n, stride, row in zip(shape, strides, rows, strict=True) if n > 1}
        wide = [n for n in shape if n > 1]
        if (
            start
            or sorted(wide) != sorted(n for n in view.shape if n > 1)
            or len(steps) < len(wide)
        ):
            return None
        if any(stride not in steps for n, stride in zip(*pairs_of(view), strict=True) if n > 1):
            return None
        along = tuple(
            steps[stride] if n > 1 else 1 for n, stride in zip(*pairs_of(view), strict=True)
        )
        return Weight(index, 0, tuple(view.shape), along)

    def keeps_axes(self, tensor: Tensor) -> bool:
        """Whether no axis of the parameters that a tensor is made of is cut in several."""
        for weight in self.weights(tensor):
            shape = self.builder.shapes[weight.parameter]
            ends = {math.prod(shape[i:]) for i in range(len(shape) + 1)}
            for n, step in weight.steps:
                if n > 1 and step and not {step, step * n} <= ends:
                    return False
        return True

    def fold(self, tensor: Tensor, weight: Weight) -> None:
        """Say that a tensor is a view of a parameter, neighbouring axes of it joined."""
        groups, rest = [], list(range(len(weight.shape)))
        for n in tensor.shape:
            group: list[int] = []
            while rest and math.prod(weight.shape[i] for i in group) < n:
                group.append(rest.pop(0))
            if math.prod(weight.shape[i] for i in group) != n:
                return
            groups.append(tuple(group))
        if all(weight.shape[i] == 1 for i in rest):
            self.folded.put(tensor, (weight, tuple(groups)))

    def forget(self, tensor: Tensor) -> None:
        """Know nothing of a tensor any more, as of one that is written anew."""
        for each in vars(self).values():
            if isinstance(each, Beside):
                each.drop(tensor)

    def name(self, weights: Sequence[Weight]) -> str:
        """Of the layer that a parameter belongs to."""
        if not weights or weights[0].parameter >= len(self.builder.names):
            return ""
        name = self.builder.names[weights[0].parameter]
        return name.rpartition(".")[0] or name
