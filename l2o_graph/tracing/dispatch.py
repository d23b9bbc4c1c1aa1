"""Dispatch of operators to rules, by the names of ATen operators.

An operator is followed if it has a rule, is a view, or works elementwise. After any other operator,
the neurons of its inputs keep their order, and its outputs are unlabelled.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2o_graph.layout.spec import ACTIVATIONS
from l2o_graph.layout.tensors import is_sharded, is_wrapper
from l2o_graph.tracing.elementwise import OF_WEIGHTS, follow_elementwise
from l2o_graph.tracing.labels import Label, NotFollowed, data, view_label
from l2o_graph.tracing.operations import ALONG_AXES, OPERATIONS, dims_of
from l2o_graph.tracing.trace import Trace
from l2o_graph.tracing.weight import Weight

# Index of a parameter, the module that holds it, its name in the module, and the parameter.
Slot = tuple[int, nn.Module, str, Tensor]
OTHER_NAMES = {"log_sigmoid_forward": "logsigmoid"}  # functions named differently from operators
# Elementwise operators, besides those with torch's tag ``pointwise``.
ELEMENTWISE = {
    "_prelu_kernel", "_to_copy", "alias_copy", "bernoulli", "celu", "clamp_max", "clamp_min",
    "clone", "dropout", "elu", "elu_backward", "fake_quantize_per_channel_affine_cachemask",
    "fake_quantize_per_tensor_affine", "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "_fake_quantize_learnable_per_tensor_affine", "_fused_moving_avg_obs_fq_helper", "floor_divide",
    "hardsigmoid", "hardswish", "hardswish_backward", "hardtanh", "ldexp", "leaky_relu",
    "leaky_relu_backward", "lift_fresh_copy", "log_sigmoid_backward", "log_sigmoid_forward",
    "native_dropout", "native_dropout_backward", "relu6", "rrelu_with_noise", "rsub", "selu",
    "sigmoid_backward", "softplus_backward", "threshold_backward", "where",
}  # fmt: skip
# Operators whose results have exchangeable entries: all equal, or random and i.i.d.
EXCHANGEABLE = {
    "empty", "empty_like", "full", "full_like", "new_empty", "new_full", "new_ones",
    "new_zeros", "ones", "ones_like", "rand", "rand_like", "randn", "randn_like", "scalar_tensor",
    "zero", "zeros", "zeros_like", "fill", "uniform", "normal", "exponential",
}  # fmt: skip
# Operators that return entries of their first tensor.
SELECTIONS = {"index", "index_select", "gather", "flip", "roll", "sort", "topk"}
# Reductions that are symmetric in the entries.
STATISTICS = {
    "mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod",
    "var_mean", "std_mean", "any", "all",
}  # fmt: skip
# Reductions and selections that return indices, or several tensors.
WITH_INDICES = {
    "max", "min", "median", "nanmedian", "argmax", "argmin", "aminmax", "var_mean", "std_mean",
    "sort", "topk", "kthvalue", "mode", "cummax", "cummin",
}  # fmt: skip
# Operators on pixels or tokens along the last axes; the name has their number.
SPATIAL = (
    "avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_", "lp_pool",
    "reflection_pad", "replication_pad", "grid_sampler_", "fractional_max_pool", "max_unpool",
    "_upsample_",
)  # fmt: skip
# Operators that turn a tensor into a view of itself.
IN_PLACE_VIEWS = {"squeeze_", "unsqueeze_", "t_", "transpose_"}


class TracingMode(TorchDispatchMode):
    """Dispatch mode that follows every operation in a trace, without changing results."""

    def __init__(self, trace: Trace, slots: Sequence[Slot] = ()):
        super().__init__()
        self.trace, self.inside = trace, 0  # number of enclosing layers with a rule
        self.slots = slots  # parameters that are still sharded, or have no shape yet

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.trace.is_blind |= any(map(is_sharded, types))
        if any(map(is_wrapper, types)):
            return NotImplemented  # it dispatches its own operations, which arrive here
        if self.trace.note_nested((args, kwargs)):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "repeat" and not self.inside and len(args[1]) >= args[0].dim():
            with self:
                return _repeated(*args)
        # In inference mode autograd does not decompose composite operators.
        if func._can_decompose() and not self.inside and not name.startswith(SPATIAL):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        self._find_parameters()
        # State is keyed by the geometry before the operation.
        read = (args[0].detach(), *args[1:]) if name in IN_PLACE_VIEWS else args
        out = func(*args, **kwargs)
        if not self.inside and not self.trace.note_nested(out):
            follow(self.trace, func, read, kwargs, out)
        return out

    def _find_parameters(self) -> None:
        """Register full tensors of sharded parameters, which FSDP2 puts in modules for a call.

        Also parameters of lazy modules that have got their shapes.
        """
        missing = []
        for slot in self.slots:
            index, module, name, shard = slot
            found = module._parameters.get(name)
            if found is None or (found is shard and (is_lazy(found) or is_sharded(found))):
                missing.append(slot)
            else:
                self.trace.bind(index, found)
        self.slots = missing


def follow(trace: Trace, operator: Any, args: tuple, kwargs: dict, out: Any) -> None:
    """Follow an operator after its call; errors of rules remove labels, and stop nothing else."""
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and not is_wrapper(type(t))]
    given = tree_leaves((args, kwargs))
    if not outs or any(map(is_lazy, (*outs, *given))):
        return
    if not any(t.numel() for t in outs):  # no computation, as in an expert without tokens
        return
    name = operator.overloadpacket.__name__.removesuffix("_")
    if name.startswith("_scaled_dot_product"):
        name = "_scaled_dot_product"
    inputs = [t for t in given if isinstance(t, Tensor) and name not in EXCHANGEABLE]
    before = trace.sets_of(inputs)
    read, first = trace.parameters_of(inputs), len(trace.builder.placed)
    for t in inputs:
        trace.builder.fix_order(trace.reveals.get(t) or ())
        if not operator.is_view:
            trace.mark_used(t)
            trace.builder.fix_order(trace.hidden_in(t))
    # Saved, because a rule may replay operations.
    outer_reads, trace.builder.recent_reads = trace.builder.recent_reads, set()
    # Whether the operator writes into its first argument.
    written = operator._schema.is_mutable and bool(args) and any(args[0] is t for t in outs)
    known, was_exchangeable = trace.label(outs[0]), written and trace.is_exchangeable(outs[0])
    try:
        _follow(trace, name, operator, args, kwargs, inputs, outs)
    except NotFollowed:
        trace.builder.fix_order(trace.sets_of(inputs))
        for t in outs:
            trace.set_label(t, None)
    except Exception:  # neither tracing nor the call is interrupted
        for t in outs:
            trace.forget(t)
        trace.builder.fix_order(before)
    if not any(map(trace.statistics.get, outs)):
        placed = {*trace.builder.placed[first:]} | trace.parameters_of(outs)
        trace.builder.exposed |= read - placed
    function = OTHER_NAMES.get(name, name)
    if function in ACTIVATIONS:
        trace.set_activation(trace.label(outs[0]), function)
    trace.builder.fix_order(before - trace.sets_of(outs) - trace.builder.recent_reads)
    trace.builder.recent_reads |= outer_reads
    if written and (trace.label(outs[0]).sets() or not trace.is_exchangeable(outs[0])):
        trace.mark_written(outs[0])
    if written:
        _update_aliases(trace, outs[0], was_exchangeable, trace.label(outs[0]) == known)


def _repeated(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compute ``x.repeat(sizes)`` by views and one copy, which can be followed."""
    x = x[(None,) * (len(sizes) - x.dim())]
    wide = [size for pair in zip(sizes, x.shape, strict=True) for size in pair]
    alone = x.reshape([size for n in x.shape for size in (1, n)])
    copy = alone.expand(wide).clone(memory_format=torch.contiguous_format)
    return copy.view([n * m for n, m in zip(sizes, x.shape, strict=True)])


def _follow(
    trace: Trace, name: str, operator: Any, args: tuple, kwargs: dict, inputs: list, outs: list
) -> None:
    """Follow an operator as a view, elementwise, or by its rule."""
    seeded = trace.is_seeded(operator, kwargs)
    if name in EXCHANGEABLE or seeded:  # reads only the shapes of its inputs
        for t in outs:
            trace.forget(t)
            trace.set_label(t, data(t.shape))  # others may be written into it
            trace.set_exchangeable(t, not seeded)
        return None
    if name == "_fused_moving_avg_obs_fq_helper":  # the others are what it has seen of the first
        inputs = inputs[:1]
    labelled = [t for t in inputs if trace.label(t).sets()]
    weights = [t for t in inputs if trace.weights(t)]
    replaced = operator.overloadpacket.__name__ in IN_PLACE_VIEWS
    if operator.is_view or replaced or name in ("_unsafe_view", "as_strided", "detach"):
        return _follow_view(trace, operator, args, kwargs, outs)
    elementwise = torch.Tag.pointwise in operator.tags or name in ELEMENTWISE
    if not labelled and not (name in OPERATIONS and name not in STATISTICS and weights):
        _follow_data(trace, name, elementwise, inputs, outs)
    of_weight = name in OF_WEIGHTS and not labelled and (not weights or weights[0] is inputs[0])
    if (elementwise and name not in OPERATIONS) or of_weight:
        return follow_elementwise(trace, name, inputs, outs)
    if name in STATISTICS and not labelled:
        return None
    if name in OPERATIONS:
        if name in ALONG_AXES:
            args, kwargs = (args[0], _axes_of(operator, args, kwargs)), {}
        trace.set_label(outs[0], OPERATIONS[name](trace, outs[0], *args, **kwargs))
        return _label_indices(trace, name, args, outs) if name in WITH_INDICES else None
    if labelled and labelled[0] is inputs[0] and name.startswith(SPATIAL):
        return _follow_spatial(trace, name, inputs[0], outs)
    raise NotFollowed


def _follow_data(trace: Trace, name: str, elementwise: bool, inputs: list, outs: list) -> None:
    """Record whether outputs without neurons are exchangeable or statistics of parameters."""
    varying = [t for t in inputs if not trace.is_exchangeable(t)]
    is_full = all(t.numel() == 1 for t in outs)  # full reductions
    statistic = bool(varying) and all(
        trace.statistics.get(t)
        or (name in STATISTICS and trace.weights(t) and (is_full or trace.keeps_axes(t)))
        for t in varying
    )
    for t in outs:
        if not any(t is x for x in inputs):
            trace.forget(t)
        selected = name in SELECTIONS and trace.is_exchangeable(inputs[0])
        trace.set_exchangeable(t, selected or (elementwise and not varying and bool(inputs)))
        trace.statistics.put(t, (statistic and (elementwise or name in STATISTICS)) or None)


def _follow_view(trace: Trace, operator: Any, args: tuple, kwargs: dict, outs: list) -> None:
    """Follow a view by computing it on tensors without data."""
    x = args[0]
    label, weights = trace.label(x), trace.weights(x)
    if label.sets():
        name = operator.overloadpacket.__name__
        if trace.label(outs[0]) == label and outs[0].shape == x.shape:
            return  # an equal view, or other strides along axes of size 1
        unfit = ("view_as_real", "view_as_complex", "as_strided", "as_strided_")
        if name in unfit or outs[0].dtype != x.dtype:
            raise NotFollowed
        views = tree_leaves(operator(_meta_like(x), *args[1:], **kwargs))
        for out, view in zip(outs, views, strict=True):
            try:
                trace.set_label(out, view_label(label, view))
            except NotFollowed:
                trace.builder.fix_order(label.sets())
                trace.set_label(out, None)
    elif weights and not trace.weights(outs[0]):  # a view of a computed weight
        for i, out in enumerate(outs):
            views = []
            for w in weights:
                try:
                    view = tree_leaves(operator(_stand_in(w), *args[1:], **kwargs))[i]
                except RuntimeError:  # the parameter has no such view
                    break
                at, shape, strides = view.storage_offset(), view.shape, view.stride()
                views.append(replace(w, start=at, shape=tuple(shape), strides=tuple(strides)))
            if len(views) < len(weights):
                views = [replace(w, masked=True) for w in views]
                if not views and len(weights) == len(outs) == 1:
                    trace.fold(out, weights[0])
            trace.derived.put(out, views)
    else:
        for out in outs:
            trace.set_exchangeable(out, trace.is_exchangeable(x))
            trace.statistics.put(out, trace.statistics.get(x))


def _meta_like(x: Tensor) -> Tensor:
    """Return a contiguous meta tensor of the same shape and dtype."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _stand_in(weight: Weight) -> Tensor:
    """Return a meta tensor with the offset, shape and strides of a weight."""
    steps = weight.axes
    last = weight.start + sum((n - 1) * stride for n, stride in steps)
    storage = torch.empty(last + 1, device="meta")
    return storage.as_strided(weight.shape, weight.strides, weight.start)


def _update_aliases(trace: Trace, written: Tensor, was_exchangeable: bool, same: bool) -> None:
    """Combine written neurons with those of other tensors in the same storage, as in a sum.

    ``was_exchangeable`` refers to the entries before the write; ``same`` tells whether the label of
    the written tensor is the same as before.
    """
    label = trace.label(written)
    steps = {written.stride(i): i for i in range(written.dim()) if written.shape[i] > 1}
    made: list[tuple[Label, Label, Label | None]] = []
    for where, known in trace.labels.aliases(written):
        _, shape, strides, _ = where
        if same and not (label.sets() and math.prod(shape) > written.numel()):
            continue  # all of its entries were changed
        axes: list = []
        for i, (n, stride) in enumerate(zip(shape, strides, strict=True)):
            at = steps.get(stride) if n > 1 else None
            if at is not None and written.shape[at] == n:
                axes.append(label.axes[at])
            elif all(f.set is None for f in known.axes[i]):
                axes.append(())  # a slice of data
            else:
                axes.append(None)
        whole = None
        kept = {f.set for axis in axes for f in axis or () if f.set is not None}
        if None not in axes and kept == set(label.sets()):
            one = data((1,) * len(shape)) if was_exchangeable and not known.sets() else known
            other = Label(tuple(axes), label.start)
            found = [w for a, b, w in made if (a, b) == (one, other)]
            with suppress(NotFollowed):
                whole = found[0] if found else trace.combine(one, other, shape, "sum")
            made.append((one, other, whole))
        if whole is None:
            trace.builder.fix_order(known.sets())
        trace.labels.put_at(written, where, whole)


def _follow_spatial(trace: Trace, name: str, x: Tensor, outs: list[Tensor]) -> None:
    """Follow an operator on pixels: labels of the other axes are unchanged."""
    moved = next(int(c) for c in name if c in "123")
    label = trace.label(x)
    if any(f.set is not None for axis in label.axes[-moved:] for f in axis):
        label = trace.as_places(label, range(x.dim() - moved, x.dim()))
    stay = label.axes[:-moved]
    for out in outs:
        axes = (*stay, *data(out.shape[len(stay) :]).axes)
        trace.set_label(out, Label(axes, label.start).pruned())


def _label_indices(trace: Trace, name: str, args: tuple, outs: list[Tensor]) -> None:
    """Label further outputs of a reduction or selection: values or indices.

    Indices along neurons reveal the order of the neurons to operations that read them.
    """
    label, places = trace.label(outs[0]), outs if name in ("argmax", "argmin") else outs[1:]
    before = trace.label(args[0])
    along = {f.set for i in args[1] for f in before.axes[i] if f.set is not None}
    for t in places:
        if along and name not in ("aminmax", "var_mean", "std_mean"):
            trace.set_label(t, None)
            trace.reveals.put(t, along)
        elif t is not outs[0]:
            trace.set_label(t, label if label.sets() else None)


def _axes_of(operator: Any, args: tuple, kwargs: dict) -> list[int]:
    """Return the axes that a call of an operator works along."""
    schema = operator._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    for a in schema:
        if a.name in ("dim", "dims"):
            return dims_of(args[0], given.get(a.name, a.default_value))
    return dims_of(args[0], None)


def replay(trace: Trace, function: Callable[..., Tensor], *tensors: Tensor | None) -> Label:
    """Follow a fused operator by replaying its parts on tensors without data."""
    stand_ins = []
    for t in tensors:
        stand_in = None
        if t is not None:
            stand_in = _meta_like(t)
            if trace.label(t).sets():
                trace.set_label(stand_in, trace.label(t))
            elif weights := trace.weights(t):
                trace.derived.put(stand_in, weights)
        stand_ins.append(stand_in)
    with torch.no_grad(), TracingMode(trace):
        out = function(*stand_ins)
    for t, stand_in in zip(tensors, stand_ins, strict=True):
        if t is not None and stand_in is not None:
            trace.set_label(t, trace.label(stand_in))
    return trace.label(out)
