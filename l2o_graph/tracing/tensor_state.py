"""State of tracing: labels of tensors, and the parameters that tensors are made of."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from l2o_graph.layout.tensors import is_sharded
from l2o_graph.tracing.builder import Builder
from l2o_graph.tracing.labels import Label, data, expanded
from l2o_graph.tracing.tensor_map import TensorMap, extent_of, sizes_and_strides, storage_of
from l2o_graph.tracing.weight import Weight


class TensorState:
    """State of tracing for each tensor of a computation.

    Attributes:
        builder: Graph so far.
        labels: Labels of tensors with neurons.
        derived: Weights that a tensor was computed from elementwise.
        folded: For views with merged axes of a parameter, the parameter with split axes, and the
            numbers of its axes that each axis of the view consists of.
        pieces: For concatenations of data along an axis, sizes of the pieces, and whether the
            entries of each are exchangeable.
        statistics: Tensors that are reductions of parameters, invariant to their permutations.
        reveals: Sets whose order a tensor's values reveal, such as an argmax over neurons.
        used: Parameters that an operation has read.
        numbers: Those of which single numbers are factors of neurons.
        cell_sets: Set of the hidden neurons of each recurrent cell.
        is_blind: Whether an operation had sharded tensors, which cannot be traced.
        has_nested: Whether an operation had nested tensors.

    Args:
        named: Names and parameters of the network.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]]):
        self.builder = Builder(
            [name for name, _ in named], [() if is_lazy(p) else tuple(p.shape) for _, p in named]
        )
        # (first index, last index, parameter) by storage, which several parameters may share, such
        # as the flattened ones of cuDNN's LSTMs.
        self._of_storage: dict[int | None, list[tuple[int, int, int]]] = {}
        self._strides = [() if is_lazy(p) else tuple(p.stride()) for _, p in named]
        for i, (_, p) in enumerate(named):
            self.bind(i, p)
        self._seed = torch.initial_seed()
        self.labels: TensorMap[Label] = TensorMap()
        self.derived: TensorMap[list[Weight]] = TensorMap()
        self.folded: TensorMap[tuple[Weight, tuple[tuple[int, ...], ...]]] = TensorMap()
        self._exchangeable: TensorMap[bool] = TensorMap()
        self.pieces: TensorMap[dict[int, list[tuple[int, bool]]]] = TensorMap()
        self.statistics: TensorMap[bool] = TensorMap()
        self.reveals: TensorMap[set[int]] = TensorMap()
        self.used: set[int] = set()
        self.numbers: set[int] = set()
        self.cell_sets: dict[nn.Module, int] = {}
        self.is_blind = self.has_nested = False

    def bind(self, index: int, tensor: Tensor) -> None:
        """Register a tensor as a parameter, unless it is lazy or sharded."""
        if is_lazy(tensor) or is_sharded(tensor):
            return
        self.builder.shapes[index], self._strides[index] = sizes_and_strides(tensor)
        key = storage_of(tensor)
        if key is not None:
            self._of_storage.setdefault(key, []).append((*extent_of(tensor), index))

    def note_nested(self, found: Any) -> bool:
        """Return whether there is a strided nested tensor, which has no axes, and record it."""
        is_nested = any(
            t.is_nested and t.layout == torch.strided
            for t in tree_leaves(found)
            if isinstance(t, Tensor)
        )
        self.has_nested |= is_nested
        return is_nested

    def label(self, tensor: Tensor) -> Label:
        """Return the label of a tensor; by default that of data."""
        known = self.labels.get(tensor)
        if known is not None and known.shape == tensor.shape:
            return known
        label = data(tensor.shape)
        for i, (n, stride) in enumerate(zip(*sizes_and_strides(tensor), strict=True)):
            if stride == 0 and n > 1:
                label = label.with_axis(i, (expanded(n),))
        return label

    def set_label(self, tensor: Tensor, label: Label | None) -> None:
        """Set the label of a tensor, or remove it with None."""
        fits = label is not None and label.shape == tuple(tensor.shape)
        self.labels.put(tensor, label if fits else None)

    def sets_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """Return the sets along any axis of some tensors."""
        return {s for t in tensors for s in self.label(t).sets()}

    def hidden_in(self, tensor: Tensor) -> list[int]:
        """Return the sets of labelled tensors that share the storage of an unlabelled one."""
        if self.label(tensor).sets():
            return []
        return [s for _, label in self.labels.aliases(tensor) for s in label.sets()]

    def is_exchangeable(self, tensor: Tensor) -> bool:
        """Return whether the entries are exchangeable: all equal, or random and i.i.d."""
        return tensor.numel() == 1 or bool(self._exchangeable.get(tensor))

    def set_exchangeable(self, tensor: Tensor, exchangeable: bool) -> None:
        """Set whether the entries of a tensor are exchangeable."""
        self._exchangeable.put(tensor, exchangeable or None)

    def is_seeded(self, operator: Any, kwargs: dict) -> bool:
        """Return whether an operator draws the same random numbers in each call of the network."""
        if torch.Tag.nondeterministic_seeded not in operator.tags:
            return False
        return kwargs.get("generator") is not None or torch.initial_seed() != self._seed

    def mark_written(self, tensor: Tensor) -> None:
        """Record a write: entries of tensors in this storage are no longer exchangeable."""
        for where, _ in self._exchangeable.aliases(tensor):
            self._exchangeable.put_at(tensor, where, None)
        self._exchangeable.drop(tensor)

    def operand(self, tensor: Tensor) -> Label:
        """Return the label of an operand, with axes of size 1 if it distinguishes no neurons."""
        label = self.label(tensor)
        no_order = self.is_exchangeable(tensor) or self.weights(tensor) or not tensor.numel()
        if not label.sets() and no_order:
            return data((1,) * tensor.dim())
        return label

    def is_weight(self, tensor: Tensor) -> bool:
        """Return whether a tensor is computed from parameters and has no neurons."""
        return not self.label(tensor).sets() and bool(self.weights(tensor))

    def weights(self, tensor: Tensor | None) -> list[Weight]:
        """Return the weights that a tensor is a view of, or was computed from elementwise."""
        if tensor is None:
            return []
        derived = self.derived.get(tensor)
        if derived is not None:
            return derived
        place = self._parameter_of(tensor)
        own = place and self._in_contiguous_layout(*place, tensor)
        return [own] if own else []

    def parameters_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """Return the parameters that tensors are views of, or were computed from elementwise."""
        found = {w.parameter for t in tensors for w in self.weights(t)}
        return found | {f[0].parameter for t in tensors if (f := self.folded.get(t))}

    def mark_used(self, tensor: Tensor) -> None:
        """Record that an operation reads a tensor, which may be a view of a parameter."""
        is_computed = self.derived.get(tensor) is not None
        if tensor.numel() and not is_computed and (place := self._parameter_of(tensor)):
            self.used.add(place[0])

    def _parameter_of(self, tensor: Tensor) -> tuple[int, int] | None:
        """Return the parameter that a tensor is a view of, and the view's first scalar."""
        key = storage_of(tensor)
        if key not in self._of_storage:
            return None
        first, last = extent_of(tensor)
        places = self._of_storage[key]
        return next(((i, first - a) for a, b, i in places if a <= first and last <= b), None)

    def _in_contiguous_layout(self, index: int, start: int, view: Tensor) -> Weight | None:
        """Return a view of a parameter as a view of the parameter in contiguous layout.

        None if the parameter has another layout, such as channels_last, and axes of the view are
        not axes of the parameter.
        """
        shape, strides = self.builder.shapes[index], self._strides[index]
        weight = Weight(index, start, tuple(view.shape), tuple(view.stride()))
        if Weight(index, 0, shape, strides).dense:
            return weight
        own = {strides[i]: math.prod(shape[i + 1 :]) for i, n in enumerate(shape) if n > 1}
        sizes = [n for n in shape if n > 1]
        axes = [(n, stride) for n, stride in weight.axes if n > 1]
        if start or len(own) < len(sizes) or sorted(sizes) != sorted(n for n, _ in axes):
            return None
        if any(stride not in own for _, stride in axes):
            return None
        return replace(weight, strides=tuple(own[s] if n > 1 else 1 for n, s in weight.axes))

    def keeps_axes(self, tensor: Tensor) -> bool:
        """Return whether each axis of a tensor is a whole axis of its parameters, or several."""
        for weight in self.weights(tensor):
            shape = self.builder.shapes[weight.parameter]
            ends = {math.prod(shape[i:]) for i in range(len(shape) + 1)}
            for n, step in weight.axes:
                if n > 1 and step and not {step, step * n} <= ends:
                    return False
        return True

    def fold(self, tensor: Tensor, weight: Weight) -> None:
        """Record that a tensor is a weight with adjacent axes merged."""
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
        """Remove all state of a tensor, as it was overwritten."""
        for each in vars(self).values():
            if isinstance(each, TensorMap):
                each.drop(tensor)

    def layer_name(self, weights: Sequence[Weight]) -> str:
        """Return the name of the layer of the first of some weights; "" without any."""
        if not weights or weights[0].parameter >= len(self.builder.names):
            return ""
        name = self.builder.names[weights[0].parameter]
        return name.rpartition(".")[0] or name
