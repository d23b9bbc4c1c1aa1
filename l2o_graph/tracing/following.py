"""What each of torch's own operations does to neurons.

Names are those of the ATen operators, to which torch brings every module and function. An operator
is followed if it has a rule, is a view, or works entry by entry; any other ends what is known
of the tensors that it reads: their neurons keep their order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2o_graph.layout.spec import ACTIVATIONS
from l2o_graph.layout.tensors import is_sharded, is_wrapper
from l2o_graph.tracing.builder import Weight
from l2o_graph.tracing.labels import Factor, Label, data, viewed
from l2o_graph.tracing.operations import ALONG_AXES, OPERATIONS, dims_of
from l2o_graph.tracing.trace import Trace

# Where a parameter is: its index, the module that holds it, its name there, and it itself.
Slot = tuple[int, nn.Module, str, Tensor]
SUMS = {"add", "sub", "rsub"}
OTHER_NAMES = {"log_sigmoid_forward": "logsigmoid"}  # of functions
# What works entry by entry, besides the operators that torch itself marks so.
ENTRY_BY_ENTRY = {
    "_prelu_kernel", "_to_copy", "alias_copy", "bernoulli", "celu", "clamp_max", "clamp_min",
    "clone", "dropout", "elu", "elu_backward", "fake_quantize_per_channel_affine_cachemask",
    "fake_quantize_per_tensor_affine", "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "floor_divide",
    "hardsigmoid", "hardswish", "hardswish_backward", "hardtanh", "ldexp", "leaky_relu",
    "leaky_relu_backward", "lift_fresh_copy", "log_sigmoid_backward", "log_sigmoid_forward",
    "native_dropout", "native_dropout_backward", "relu6", "rrelu_with_noise", "rsub", "selu",
    "sigmoid_backward", "softplus_backward", "threshold_backward", "where",
}  # fmt: skip
# Tensors of one number, and random ones: no order of their entries can be told.
EVEN = {
    "empty", "empty_like", "full", "full_like", "new_empty", "new_full", "new_ones",
    "new_zeros", "ones", "ones_like", "rand", "rand_like", "randn", "randn_like", "scalar_tensor",
    "zero", "zeros", "zeros_like", "fill", "uniform", "normal", "exponential",
}  # fmt: skip
# What gives entries of its first tensor, and nothing else.
PICKED = {"index", "index_select", "gather", "flip", "roll", "sort", "topk"}
# What makes a weight out of a parameter, besides what works entry by entry.
OF_WEIGHTS = {
    "_native_batch_norm_legit", "_softmax", "_weight_norm_interface", "cudnn_batch_norm",
    "native_batch_norm", "native_group_norm", "native_layer_norm", "_fused_rms_norm",
    "_batch_norm_with_update", "_native_batch_norm_legit_functional",
}  # fmt: skip
# What brings entries together, all alike.
STATISTICS = {
    "mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod",
    "var_mean", "std_mean", "any", "all",
}  # fmt: skip
# What says where the numbers were that it gives, or gives several.
WITH_PLACES = {
    "max", "min", "median", "nanmedian", "argmax", "argmin", "aminmax", "var_mean", "std_mean",
    "sort", "topk", "kthvalue", "mode", "cummax", "cummin",
}  # fmt: skip
# What moves pixels or tokens along the last axes, as many as the name says.
SPATIAL = (
    "avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_", "lp_pool",
    "reflection_pad", "replication_pad", "grid_sampler_", "fractional_max_pool", "max_unpool",
    "_upsample_",
)  # fmt: skip
# Views that are put in the place of the tensor itself.
IN_PLACE_VIEWS = {"squeeze_", "unsqueeze_", "t_", "transpose_"}


class Following(TorchDispatchMode):
    """Tells a trace of every operation, as it is computed; results are what they are without."""

    def __init__(self, trace: Trace, slots: Sequence[Slot] = ()):
        super().__init__()
        self.trace, self.inside = trace, 0  # inside of so many layers that have a rule
        self.slots = slots  # of parameters that were not put together, or have no shape yet

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.trace.is_blind |= any(map(is_sharded, types))
        if any(map(is_wrapper, types)):
            return NotImplemented  # it takes itself apart, into operations that come here
        if self.trace.meets_nested((args, kwargs)):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "repeat" and not self.inside and len(args[1]) >= args[0].dim():
            with self:
                return _repeated(*args)
        # In inference mode autograd does not take composite operators apart.
        if func._can_decompose() and not self.inside and not name.startswith(SPATIAL):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        self._find()
        # What is known is known of the tensor as it was.
        read = (args[0].detach(), *args[1:]) if name in IN_PLACE_VIEWS else args
        out = func(*args, **kwargs)
        if not self.inside and not self.trace.meets_nested(out):
            follow(self.trace, func, read, kwargs, out)
        return out

    def _find(self) -> None:
        """Find whole tensors where sharded parameters were, as FSDP2 puts them for a call.

        And parameters of lazy modules that have a shape by now.
        """
        missing = []
        for slot in self.slots:
            index, module, name, shard = slot
            found = module._parameters.get(name)
            if found is None or (found is shard and (is_lazy(found) or is_sharded(found))):
                missing.append(slot)
            else:
                self.trace.place(index, found)
        self.slots = missing


def follow(trace: Trace, operator: Any, args: tuple, kwargs: dict, out: Any) -> None:
    """Say what the outputs of an operator are; raises nothing, whatever a rule does."""
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and not is_wrapper(type(t))]
    given = tree_leaves((args, kwargs))
    if not outs or any(map(is_lazy, (*outs, *given))):
        return
    if not any(t.numel() for t in outs):  # nothing was computed, as by an expert without tokens
        return
    name = operator.overloadpacket.__name__.removesuffix("_")
    if name.startswith("_scaled_dot_product"):
        name = "_scaled_dot_product"
    inputs = [t for t in given if isinstance(t, Tensor) and name not in EVEN]
    before = trace.sets_of(inputs)
    read, first = trace.parameters_of(inputs), len(trace.builder.placed)
    for t in inputs:
        trace.builder.lose(trace.knows.get(t) or ())
        if not operator.is_view:
            trace.use(t)
            trace.builder.lose(trace.hidden_in(t))
    # What a rule replays is followed in between.
    around, trace.builder.touched = trace.builder.touched, set()
    # Whether it writes its answer into its first argument.
    written = operator._schema.is_mutable and bool(args) and any(args[0] is t for t in outs)
    known, blank = trace.label(outs[0]), written and trace.is_even(outs[0])
    try:
        _follow(trace, name, operator, args, kwargs, inputs, outs)
    except Exception:  # one operation never ends the reading, nor the call that is watched
        for t in outs:
            trace.forget(t)
        trace.builder.lose(before)
    if not any(map(trace.statistics.get, outs)):
        here = {*trace.builder.placed[first:]} | trace.parameters_of(outs)
        trace.builder.known |= read - here
    function = OTHER_NAMES.get(name, name)
    if function in ACTIVATIONS:
        trace.activated(trace.label(outs[0]), function)
    trace.builder.lose(before - trace.sets_of(outs) - trace.builder.touched)
    trace.builder.touched |= around
    if written and (trace.label(outs[0]).sets() or not trace.is_even(outs[0])):
        trace.uneven(outs[0])
    if written:
        _rewritten(trace, outs[0], blank, trace.label(outs[0]) == known)


def _repeated(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """A tensor several times along each axis, by views and one copy."""
    x = x[(None,) * (len(sizes) - x.dim())]
    wide = [size for pair in zip(sizes, x.shape, strict=True) for size in pair]
    alone = x.reshape([size for n in x.shape for size in (1, n)])
    copy = alone.expand(wide).clone(memory_format=torch.contiguous_format)
    return copy.view([n * m for n, m in zip(sizes, x.shape, strict=True)])


def _follow(
    trace: Trace, name: str, operator: Any, args: tuple, kwargs: dict, inputs: list, outs: list
) -> None:
    seeded = trace.is_seeded(operator, kwargs)
    if name in EVEN or seeded:  # whatever it is given, it reads the shape alone
        for t in outs:
            trace.forget(t)
            trace.set_label(t, data(t.shape))  # something may be written into it
            trace.set_even(t, not seeded)
        return None
    labelled = [t for t in inputs if trace.label(t).sets()]
    weights = [t for t in inputs if trace.weights(t)]
    replaced = operator.overloadpacket.__name__ in IN_PLACE_VIEWS
    if operator.is_view or replaced or name in ("_unsafe_view", "as_strided", "detach"):
        return _follow_view(trace, operator, args, kwargs, outs)
    one_by_one = torch.Tag.pointwise in operator.tags or name in ENTRY_BY_ENTRY
    if not labelled and not (name in OPERATIONS and name not in STATISTICS and weights):
        told = [t for t in inputs if not trace.is_even(t)]
        of_all = all(t.numel() == 1 for t in outs)  # whether all entries were brought together
        statistic = bool(told) and all(
            trace.statistics.get(t)
            or (name in STATISTICS and trace.weights(t) and (of_all or trace.keeps_axes(t)))
            for t in told
        )
        for t in outs:
            if not any(t is x for x in inputs):
                trace.forget(t)
            picked = name in PICKED and trace.is_even(inputs[0])
            trace.set_even(t, picked or (one_by_one and not told and bool(inputs)))
            trace.statistics.put(t, (statistic and (one_by_one or name in STATISTICS)) or None)
    if (one_by_one and name not in OPERATIONS) or (name in OF_WEIGHTS and not labelled):
        return _follow_entries(trace, name, inputs, outs)
    if name in STATISTICS and not labelled:
        return None
    if name in OPERATIONS:
        if name in ALONG_AXES:
            args, kwargs = (args[0], _axes(operator, args, kwargs)), {}
        label = OPERATIONS[name](trace, outs[0], *args, **kwargs)
        if label is None:
            trace.builder.lose(trace.sets_of(labelled))
        trace.set_label(outs[0], label)
        return _follow_places(trace, name, args, outs) if name in WITH_PLACES else None
    if labelled and labelled[0] is inputs[0] and name.startswith(SPATIAL):
        return _follow_spatial(trace, name, inputs[0], outs)
    trace.builder.lose(trace.sets_of(labelled))
    for t in outs:
        trace.set_label(t, None)
    return None


def _follow_view(trace: Trace, operator: Any, args: tuple, kwargs: dict, outs: list) -> None:
    x = args[0]
    label, made_of = trace.label(x), trace.weights(x)
    if label.sets():
        name = operator.overloadpacket.__name__
        if trace.label(outs[0]) == label and outs[0].shape == x.shape:
            return  # another view of the same, or other steps along axes of one entry
        unfit = ("view_as_real", "view_as_complex", "as_strided", "as_strided_")
        if name in unfit or outs[0].dtype != x.dtype:
            trace.builder.lose(label.sets())
            return
        views = tree_leaves(operator(_like(x), *args[1:], **kwargs))
        for out, view in zip(outs, views, strict=True):
            found = viewed(label, view)
            if found is None:
                trace.builder.lose(label.sets())
            trace.set_label(out, found)
    elif made_of and not trace.weights(outs[0]):  # a view of a computed weight
        for i, out in enumerate(outs):
            views = []
            for w in made_of:
                try:
                    view = tree_leaves(operator(_stand_in(w), *args[1:], **kwargs))[i]
                except RuntimeError:  # no view of this parameter lies like this
                    break
                at, shape, strides = view.storage_offset(), view.shape, view.stride()
                views.append(replace(w, start=at, shape=tuple(shape), strides=tuple(strides)))
            if len(views) < len(made_of):
                views = [replace(w, fixed=True) for w in views]
                if not views and len(made_of) == len(outs) == 1:
                    trace.fold(out, made_of[0])
            trace.derived.put(out, views)
    else:
        for out in outs:
            trace.set_even(out, trace.is_even(x))
            trace.statistics.put(out, trace.statistics.get(x))


def _like(x: Tensor) -> Tensor:
    """A tensor without numbers, of the same shape and type, laid out row by row."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _stand_in(weight: Weight) -> Tensor:
    """A tensor without numbers that lies in its storage as a weight lies in its parameter."""
    steps = weight.steps
    last = weight.start + sum((n - 1) * stride for n, stride in steps)
    storage = torch.empty(last + 1, device="meta")
    return storage.as_strided(weight.shape, weight.strides, weight.start)


def _rewritten(trace: Trace, written: Tensor, blank: bool, same: bool) -> None:
    """Say what the tensors are whose part was written: the neurons there meet those elsewhere.

    ``blank``: all of their entries were one number before; ``same``: the part is of what it was.
    """
    label = trace.label(written)
    steps = {written.stride(i): i for i in range(written.dim()) if written.shape[i] > 1}
    made: list[tuple[Label, Label, Label | None]] = []
    for where, known in trace.labels.sharing(written):
        _, shape, strides, _ = where
        if same and not (label.sets() and math.prod(shape) > written.numel()):
            continue  # all of it was changed
        axes: list = []
        for i, (n, stride) in enumerate(zip(shape, strides, strict=True)):
            at = steps.get(stride) if n > 1 else None
            if at is not None and written.shape[at] == n:
                axes.append(label.axes[at])
            elif all(f.set is None for f in known.axes[i]):
                axes.append(())  # the part is some of these entries
            else:
                axes.append(None)
        whole = None
        kept = {f.set for axis in axes for f in axis or () if f.set is not None}
        if None not in axes and kept == set(label.sets()):
            one = data((1,) * len(shape)) if blank and not known.sets() else known
            other = Label(tuple(axes), label.start)
            found = [w for a, b, w in made if (a, b) == (one, other)]
            whole = found[0] if found else trace.combine(one, other, shape, "sum")
            made.append((one, other, whole))
        if whole is None:
            trace.builder.lose(known.sets())
        trace.labels.rewrite(written, where, whole)


def _follow_spatial(trace: Trace, name: str, x: Tensor, outs: list[Tensor]) -> None:
    """Along the last axes pixels are moved; the others stay as they are."""
    moved = next(int(c) for c in name if c in "123")
    label = trace.label(x)
    stay, rest = label.axes[:-moved], label.axes[-moved:]
    if any(f.set is not None for axis in rest for f in axis):
        return trace.builder.lose(label.sets())
    for out in outs:
        axes = (*stay, *data(out.shape[len(stay) :]).axes)
        trace.set_label(out, Label(axes, label.start).only())
    return None


def _follow_places(trace: Trace, name: str, args: tuple, outs: list[Tensor]) -> None:
    """What else comes of an operator along some axes: more numbers, or where the first were.

    Places along neurons tell their order, to whatever reads them.
    """
    label, places = trace.label(outs[0]), outs if name in ("argmax", "argmin") else outs[1:]
    before = trace.label(args[0])
    along = {f.set for i in args[1] for f in before.axes[i] if f.set is not None}
    for t in places:
        if along and name not in ("aminmax", "var_mean", "std_mean"):
            trace.set_label(t, None)
            trace.knows.put(t, along)
        elif t is not outs[0]:
            trace.set_label(t, label if label.sets() else None)


def _follow_entries(trace: Trace, name: str, inputs: list[Tensor], outs: list[Tensor]) -> None:
    """Entry by entry, after broadcasting."""
    labelled = [t for t in inputs if trace.label(t).sets()]
    parameters = [t for t in inputs if trace.is_weight(t)]
    numbers = [
        t
        for t in inputs
        if not trace.label(t).sets() and not trace.weights(t) and not trace.is_even(t)
    ]
    for out in outs:
        if labelled:
            trace.set_label(out, _entries(trace, name, labelled, parameters, numbers, out))
        elif parameters and (label := _masked(trace, parameters, numbers, out)):
            trace.set_label(out, label)
        elif parameters:
            parameters = sorted(parameters, key=lambda t: t.shape != out.shape)
            made_of = [_broadcast(w, name, out) for t in parameters for w in trace.weights(t)]
            told = [t for t in numbers if not trace.statistics.get(t)]
            fixed = bool(told) and name not in OF_WEIGHTS
            fixed |= name in OF_WEIGHTS and not trace.keeps_axes(parameters[0])
            fixed |= None in made_of
            if parameters[0].shape == out.shape:
                found = dict.fromkeys(w for w in made_of if w is not None)
                trace.derived.put(out, [replace(w, fixed=w.fixed or fixed) for w in found])


def _masked(
    trace: Trace, parameters: Sequence[Tensor], numbers: Sequence[Tensor], out: Tensor
) -> Label | None:
    """A vector that meets fixed numbers along other axes alone, as a mask of tokens."""
    p, *others = parameters
    wide = [i - p.dim() for i, n in enumerate(p.shape) if n > 1]
    told = [t for t in numbers if not trace.statistics.get(t)]
    if others or not told or len(wide) != 1 or len(trace.weights(p)) != 1 or out.dim() < 3:
        return None
    if any(math.prod(t.shape[wide[0] :]) > 1 for t in told):
        return None
    size, axis = out.shape[wide[0]], out.dim() + wide[0]
    own = trace.builder.new_set(trace.name(trace.weights(p)), size)
    return trace.added(data(out.shape).with_axis(axis, (Factor(size, own, 1),)), p)


def _broadcast(weight: Weight, name: str, out: Tensor) -> Weight | None:
    """A weight in the shape of what was made of it; one of a norm for channels lies along them."""
    channels = ("batch_norm" in name or "group_norm" in name) and len(weight.shape) == 1
    return weight.broadcast(tuple(out.shape), 1 if channels else None)


def _entries(
    trace: Trace, name: str, labelled: list[Tensor], parameters: list[Tensor],
    numbers: list[Tensor], out: Tensor,
) -> Label | None:  # fmt: skip
    """Labels of several tensors, met, and what is added to them or multiplied with them."""
    kind = "sum" if name in SUMS else "product"
    first, *others = labelled
    alone = data((1,) * out.dim())
    answer: Label | None = trace.combine(trace.label(first), alone, out.shape, kind)
    for t in (*others, *numbers):
        if answer is not None:
            answer = trace.combine(answer, trace.label(t), out.shape, kind)
    for p in parameters:
        if answer is None:
            break
        if kind == "sum":
            answer = trace.added(answer, p)
        else:
            axis = _axis_of_neurons(answer, p)
            if axis is not None:
                answer = trace.scale(answer, axis, p, "scale")
            elif p.numel() > 1:
                answer = trace.added(answer, p, "product")
    if answer is None:
        trace.builder.lose(trace.sets_of(labelled))
    return answer


def _axis_of_neurons(label: Label, parameter: Tensor) -> int | None:
    """The axis, from the last, of the only run of neurons that a vector is aligned with."""
    wide = [axis - parameter.dim() for axis, n in enumerate(parameter.shape) if n > 1]
    return wide[0] if len(wide) == 1 and label.axes[wide[0]] else None


def _axes(operator: Any, args: tuple, kwargs: dict) -> list[int]:
    """The axes that a call of an operator works along."""
    schema = operator._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    for a in schema:
        if a.name in ("dim", "dims"):
            return dims_of(args[0], given.get(a.name, a.default_value))
    return dims_of(args[0], None)


def replayed(trace: Trace, function: Callable[..., Tensor], *tensors: Tensor | None) -> Label:
    """What comes of an operator that does the work of many: they are followed without numbers."""
    stand_ins = []
    for t in tensors:
        stand_in = None
        if t is not None:
            stand_in = _like(t)
            if trace.label(t).sets():
                trace.set_label(stand_in, trace.label(t))
            elif made_of := trace.weights(t):
                trace.derived.put(stand_in, made_of)
        stand_ins.append(stand_in)
    with torch.no_grad(), Following(trace):
        out = function(*stand_ins)
    for t, stand_in in zip(tensors, stand_ins, strict=True):
        if t is not None and stand_in is not None:
            trace.set_label(t, trace.label(stand_in))
    return trace.label(out)
