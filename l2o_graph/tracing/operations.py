"""What each of torch's own operations does to neurons.

Names are those of the ATen operators, to which torch brings every module and function. An operator
is followed if it has a rule here, is a view, or works entry by entry; any other ends what is known
of the tensors that it reads: their neurons keep their order.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2o_graph.architecture import ACTIVATIONS, Kernel
from l2o_graph.tracing.builder import Weight, numbered
from l2o_graph.tracing.labels import Factor, Label, data, viewed
from l2o_graph.tracing.trace import Trace

Operation = Callable[..., Label | None]
# Where a parameter is: its index, the module that holds it, its name there, and it itself.
Slot = tuple[int, nn.Module, str, Tensor]
OPERATIONS: dict[str, Operation] = {}
ALONG_AXES: set[str] = set()

SUMS = {"add", "sub", "rsub"}
OTHER_NAMES = {"log_sigmoid_forward": "logsigmoid"}  # of functions

# What works entry by entry, besides the operators that torch itself marks so.
ENTRY_BY_ENTRY = {
    "_prelu_kernel", "_to_copy", "alias_copy", "bernoulli", "celu", "clamp_max", "clamp_min",
    "clone", "dropout", "elu", "elu_backward", "fake_quantize_per_tensor_affine", "floor_divide",
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
)  # fmt: skip


def operation(*names: str, axes: bool = False) -> Callable[[Operation], Operation]:
    """Make a function the rule of operators: (trace, out, *args, **kwargs) -> label of out.

    The answer is None where it cannot be followed: the neurons of all inputs then keep their order.

    Args:
        names: Of the operators.
        axes: Whether the rule is told, in place of all arguments behind the first tensor, which
            axes the operator works along.
    """

    def add(rule: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, rule))
        if axes:
            ALONG_AXES.update(names)
        return rule

    return add


class Following(TorchDispatchMode):
    """Tells a trace of every operation, as it is computed; results are what they are without."""

    def __init__(self, trace: Trace, slots: Sequence[Slot] = ()):
        super().__init__()
        self.trace, self.inside = trace, 0  # inside of so many layers that have a rule
        self.slots = slots  # of sharded parameters that were not put together yet

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.trace.is_blind |= any(hasattr(kind, "full_tensor") for kind in types)
        # In inference mode autograd does not take composite operators apart.
        if func._can_decompose() and not self.inside:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        self._find()
        out = func(*args, **kwargs)
        if not self.inside:
            follow(self.trace, func, args, kwargs, out)
        return out

    def _find(self) -> None:
        """Find whole tensors where sharded parameters were, as FSDP2 puts them for a call."""
        missing = []
        for slot in self.slots:
            index, module, name, shard = slot
            found = module._parameters.get(name)
            if found is None or found is shard:
                missing.append(slot)
            else:
                self.trace.place(index, found)
        self.slots = missing


def follow(trace: Trace, operator: Any, args: tuple, kwargs: dict, out: Any) -> None:
    """Say what the outputs of an operator are; raises nothing, whatever a rule does."""
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if not outs:
        return
    name = operator.overloadpacket.__name__.removesuffix("_")
    if name.startswith("_scaled_dot_product"):
        name = "_scaled_dot_product"
    leaves = () if name in EVEN else tree_leaves((args, kwargs))
    inputs = [t for t in leaves if isinstance(t, Tensor)]
    before = {s for t in inputs for s in trace.label(t).sets()}
    folded = [f[0].parameter for t in inputs if (f := trace.folded(t))]
    for t in inputs:
        trace.weights(t)  # notes that it is used
        trace.builder.lose(trace.knows(t))
        if not operator.is_view:
            trace.builder.lose(trace.hidden_in(t))
    # What a rule replays is followed in between.
    around, trace.builder.touched = trace.builder.touched, set()
    written = _is_written(operator, args, outs)
    known = trace.label(outs[0])
    try:
        _follow(trace, name, operator, args, kwargs, inputs, outs)
    except Exception:  # one operation never ends the reading, nor the call that is watched
        for t in outs:
            trace.forget(t)
        trace.builder.lose(before)
    if not any(_is_known(trace, t) for t in outs):
        trace.builder.known |= {w.parameter for t in inputs for w in trace.weights(t)}
        trace.builder.known |= set(folded)
    function = OTHER_NAMES.get(name, name)
    if function in ACTIVATIONS:
        trace.activated(trace.label(outs[0]), function)
    after = {s for t in outs for s in trace.label(t).sets()}
    trace.builder.lose(before - after - trace.builder.touched)
    trace.builder.touched |= around
    if written and (trace.label(outs[0]).sets() or not trace.is_even(outs[0])):
        trace.uneven(outs[0])
    if written and trace.label(outs[0]) != known:
        _rewritten(trace, outs[0])


def _is_known(trace: Trace, t: Tensor) -> bool:
    """Whether what parameters did to a tensor has a place, or tells no order of them."""
    found = trace.label(t).sets() or trace.weights(t) or trace.folded(t)
    return bool(found) or trace.is_statistic(t)


def _is_written(operator: Any, args: tuple, outs: list[Tensor]) -> bool:
    """Whether an operator writes its answer into its first argument."""
    return operator._schema.is_mutable and bool(args) and any(args[0] is t for t in outs)


def _follow(
    trace: Trace, name: str, operator: Any, args: tuple, kwargs: dict, inputs: list, outs: list
) -> None:
    if name in EVEN:  # whatever it is given, it reads the shape alone
        for t in outs:
            trace.forget(t)
            trace.set_label(t, data(t.shape))  # something may be written into it
            trace.set_even(t, kwargs.get("generator") is None)
        return None
    labelled = [t for t in inputs if trace.label(t).sets()]
    weights = [t for t in inputs if trace.weights(t)]
    if operator.is_view or name in ("_unsafe_view", "as_strided", "detach"):
        return _follow_view(trace, operator, args, kwargs, outs)
    one_by_one = torch.Tag.pointwise in operator.tags or name in ENTRY_BY_ENTRY
    if not labelled and not (name in OPERATIONS and name not in STATISTICS and weights):
        told = [t for t in inputs if not trace.is_even(t)]
        statistic = bool(told) and all(
            trace.is_statistic(t)
            or (
                name in STATISTICS
                and trace.weights(t)
                and (_of_all(t, outs) or trace.keeps_axes(t))
            )
            for t in told
        )
        for t in outs:
            if not any(t is x for x in inputs):
                trace.forget(t)
            trace.set_even(t, one_by_one and not told and bool(inputs))
            trace.set_statistic(t, statistic and (one_by_one or name in STATISTICS))
    if (one_by_one and name not in OPERATIONS) or (name in OF_WEIGHTS and not labelled):
        return _follow_entries(trace, name, inputs, outs)
    if name in STATISTICS and not labelled:
        return None
    if name in OPERATIONS:
        if name in ALONG_AXES:
            args, kwargs = (args[0], _axes(operator, args, kwargs)), {}
        label = OPERATIONS[name](trace, outs[0], *args, **kwargs)
        if label is None:
            trace.builder.lose(s for t in labelled for s in trace.label(t).sets())
        trace.set_label(outs[0], label)
        return _follow_places(trace, name, args, outs) if name in WITH_PLACES else None
    if labelled and labelled[0] is inputs[0] and name.startswith(SPATIAL):
        return _follow_spatial(trace, name, inputs[0], outs)
    trace.builder.lose(s for t in labelled for s in trace.label(t).sets())
    for t in outs:
        trace.set_label(t, None)
    return None


def _of_all(x: Tensor, outs: list[Tensor]) -> bool:
    """Whether all entries of a tensor were brought together in one."""
    return x.numel() > 1 and all(t.numel() == 1 for t in outs)


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
            trace.derive(out, views)
    else:
        for out in outs:
            trace.set_even(out, trace.is_even(x))
            trace.set_statistic(out, trace.is_statistic(x))


def _like(x: Tensor) -> Tensor:
    """A tensor without numbers, of the same shape and type, laid out row by row."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _stand_in(weight: Weight) -> Tensor:
    """A tensor without numbers that lies in its storage as a weight lies in its parameter."""
    steps = zip(weight.shape, weight.strides, strict=True)
    last = weight.start + sum((n - 1) * stride for n, stride in steps)
    storage = torch.empty(last + 1, device="meta")
    return storage.as_strided(weight.shape, weight.strides, weight.start)


def _rewritten(trace: Trace, written: Tensor) -> None:
    """Say what the tensors are whose part was written: a slice of neurons makes all of them so."""
    label = trace.label(written)
    steps = {written.stride(i): i for i in range(written.dim()) if written.shape[i] > 1}
    for where, known in trace.labels_sharing(written):
        _, shape, strides, _ = where
        axes: list | None = []
        for i, (n, stride) in enumerate(zip(shape, strides, strict=True)):
            at = steps.get(stride) if n > 1 else None
            if at is not None and written.shape[at] == n:
                axes.append(label.axes[at])
            elif all(f.set is None for f in known.axes[i]):
                axes.append(known.axes[i])  # the part is some of these entries
            else:
                axes = None
                break
        kept = [] if axes is None else [f.set for axis in axes for f in axis if f.set is not None]
        whole = axes is not None and set(label.sets()) == set(kept)
        trace.builder.lose(s for s in known.sets() if s not in kept)
        trace.relabel(written, where, Label(tuple(axes), label.start) if whole else None)


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
    along = {f.set for i in args[1] for f in before.axes[i]} - {None}
    for t in places:
        if along and name not in ("aminmax", "var_mean", "std_mean"):
            trace.set_label(t, None)
            trace.set_knows(t, {s for s in along if s is not None})
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
        elif parameters:
            parameters = sorted(parameters, key=lambda t: t.shape != out.shape)
            made_of = [_broadcast(w, name, out) for t in parameters for w in trace.weights(t)]
            told = [t for t in numbers if not trace.is_statistic(t)]
            fixed = bool(told) and name not in OF_WEIGHTS
            fixed |= name in OF_WEIGHTS and not trace.keeps_axes(parameters[0])
            fixed |= None in made_of
            if parameters[0].shape == out.shape:
                found = dict.fromkeys(w for w in made_of if w is not None)
                trace.derive(out, [replace(w, fixed=w.fixed or fixed) for w in found])


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
    answer: Label | None = trace.meet(trace.label(first), alone, out.shape, kind)
    for t in (*others, *numbers):
        if answer is not None:
            answer = trace.meet(answer, trace.label(t), out.shape, kind)
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
        trace.builder.lose(s for t in labelled for s in trace.label(t).sets())
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
            return _dims(args[0], given.get(a.name, a.default_value))
    return _dims(args[0], None)


def _dims(x: Tensor, dims: Any) -> list[int]:
    """Axes as operators name them, by number or in a list; all of them for none."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(x.dim()))
    return [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)] if x.dim() else []


def _only_data(label: Label, axes: Iterable[int]) -> bool:
    """Whether no neurons run along some axes."""
    return all(f.set is None for axis in axes for f in label.axes[axis])


def _replayed(trace: Trace, function: Callable[..., Tensor], *tensors: Tensor | None) -> Label:
    """What comes of an operator that does the work of many: they are followed without numbers."""
    stand_ins = []
    for t in tensors:
        stand_in = None
        if t is not None:
            stand_in = _like(t)
            if trace.label(t).sets():
                trace.set_label(stand_in, trace.label(t))
            elif made_of := trace.weights(t):
                trace.derive(stand_in, made_of)
        stand_ins.append(stand_in)
    with torch.no_grad(), Following(trace):
        out = function(*stand_ins)
    for t, stand_in in zip(tensors, stand_ins, strict=True):
        if t is not None and stand_in is not None:
            trace.set_label(t, trace.label(stand_in))
    return trace.label(out)


# Products --------------------------------------------------------------------------------------


@operation("mm", "bmm", "matmul", "_sparse_mm", "mv")
def product(trace: Trace, out: Tensor, a: Tensor, b: Tensor) -> Label | None:
    """A product of matrices, one of them perhaps a parameter."""
    of_a, of_b = trace.is_weight(a), trace.is_weight(b)
    if trace.folded(b) and not of_a and (b.dim() == 2 or len(b) == 1):
        return trace.dense_folded(a, b)
    if of_a and of_b:
        return None
    if b.dim() == 1:
        return trace.dense(b, -1, a) if of_a and b.numel() > 1 else None
    if of_b:
        one = _one_of(trace, b)
        if one.dim() == 2:
            return trace.dense(a, -1, one, transposed=True)
        return _experts(trace, a, b) if a.dim() == 3 else None
    if of_a:
        one = _one_of(trace, a)
        if one.dim() == 2:
            return trace.dense(b, -2, one)
        label = _experts(trace, b.mT, a.mT) if b.dim() == 3 else None
        return label and Label((label.axes[0], label.axes[2], label.axes[1]), label.start)
    return trace.contract(trace.operand(a), trace.operand(b))


def _one_of(trace: Trace, weights: Tensor) -> Tensor:
    """The matrix that all of a batch are, where they are one; else the batch."""
    if weights.dim() != 3 or (len(weights) > 1 and weights.stride(0) != 0):
        return weights
    one = weights[0]
    if not trace.weights(one):
        found = [
            replace(w, shape=w.shape[1:], strides=w.strides[1:]) for w in trace.weights(weights)
        ]
        trace.derive(one, found)
    return one


def _experts(trace: Trace, x: Tensor, weight: Tensor) -> Label | None:
    """(experts, examples, in) times a parameter [experts, in, out]: networks side by side."""
    label, (first, *_) = trace.label(x), trace.weights(weight)
    experts, rows, columns = weight.shape
    from_rows = first.dense
    if not from_rows:  # stored as [experts, out, in]
        first = replace(
            first,
            shape=(experts, columns, rows),
            strides=(first.strides[0], first.strides[2], first.strides[1]),
        )
    outer, inner = label.axes[0], label.axes[2]
    alone = len(trace.weights(weight)) == 1 and not first.fixed
    if not first.dense or not alone or not _only_data(label, [1]):
        return None
    name = trace.name([first])
    wanted = None
    if len(outer) == len(inner) == 1 and outer[0].set is not None and not label.start:
        wanted = numbered([experts, rows], outer[0].set)
    if wanted is not None and [*outer, *inner] == wanted:
        source = outer[0].set
    elif not label.sets():
        source = trace.builder.ordered(f"input of {name}", experts * rows).set
        own = numbered([experts, rows], source or 0)
        trace.set_label(x, Label(((own[0],), label.axes[1], (own[1],))))
    elif all(f.set is None for f in outer) and inner[0].set is not None:  # each reads all of them
        source = trace.builder.new_meeting("copy", experts * rows)
        of_outer, of_inner = numbered([experts, rows], source)
        if not trace.builder.relate(
            [of_outer, of_inner], [Factor(experts), *inner], (0, label.start.get(inner[0].set, 0)),
            True, "copy",
        ):  # fmt: skip
            return None
    else:
        return None
    assert source is not None
    trace.builder.touch(source)
    target = trace.builder.new_set(name, experts * columns)
    grid = (experts, rows, columns) if from_rows else (experts, columns, rows)
    trace.builder.join(
        Kernel(first.parameter, source, target, grid, (), first.start, from_rows=from_rows)
    )
    of_outer, of_inner = numbered([experts, columns], target)
    return Label(((of_outer,), label.axes[1], (of_inner,)))


@operation("addmm", "baddbmm", "addbmm", "addmv", "_sparse_addmm")
def product_and_sum(trace: Trace, out: Tensor, c: Tensor, a: Tensor, b: Tensor, **_: Any):
    """A product of matrices with something added, mostly a bias."""
    label = product(trace, out, a, b)
    if label is not None and trace.weights(c):
        return trace.added(label, c)
    if label is None or trace.is_even(c):
        return label
    return trace.meet(label, trace.label(c), out.shape, "sum")


@operation("linear", "mkldnn_linear", "_addmm_activation")
def linear(trace: Trace, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None):
    """The last axis mapped."""
    return trace.bias(trace.dense(x, -1, weight), -1, bias)


@operation("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(
    trace: Trace, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Label | None:
    """Channels mapped, the axes behind them moved."""
    transposed, groups = rest[3], rest[5]
    if not _only_data(trace.label(x), range(2, x.dim())):
        return None
    label = trace.dense(x, 1, weight, transposed, groups, "convolution")
    label = trace.bias(label, 1, bias)
    return label and Label((*label.axes[:2], *data(out.shape[2:]).axes), label.start)


@operation("embedding")
def embedding(trace: Trace, out: Tensor, table: Tensor, index: Tensor, *_: Any) -> Label | None:
    """Rows of a table."""
    return trace.lookup(index, table)


@operation("_embedding_bag", "_embedding_bag_forward_only")
def bag(trace: Trace, out: Tensor, table: Tensor, index: Tensor, *_: Any) -> Label | None:
    """Rows of a table, some of them brought together in each."""
    label = trace.lookup(index, table)
    return label and Label((*data(out.shape[:1]).axes, label.axes[-1]))


@operation("_scaled_dot_product")
def attention(trace: Trace, out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any):
    """softmax(q k') v, head by head: products are summed within a head and weigh its values."""
    query, key, value = (trace.operand(t) for t in (q, k, v))
    key = Label((*key.axes[:-2], key.axes[-1], key.axes[-2]), key.start)
    scores = trace.contract(query, key)
    return None if scores is None else trace.contract(scores, value)


@operation("_native_multi_head_attention")
def heads(
    trace: Trace, out: Tensor, q: Tensor, k: Tensor, v: Tensor, size: int, number: int,
    *weights: Any, **__: Any,
) -> Label | None:  # fmt: skip
    """What ``nn.MultiheadAttention`` takes in evaluation, in one operator."""
    is_own = all(q is t or q.is_same(t) for t in (k, v))

    def attend(*tensors: Tensor) -> Tensor:
        read = tensors[:1] * 3 if is_own else tensors[:3]
        return _heads(size, number, *read, *tensors[-4:])

    return _replayed(trace, attend, *((q,) if is_own else (q, k, v)), *weights[:4])


def _heads(
    size: int, number: int, q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor, w_out: Tensor,
    b_out: Tensor,
) -> Tensor:  # fmt: skip
    turned = q.transpose(0, 1)
    others = (turned, turned) if q is k and k is v else (k.transpose(0, 1), v.transpose(0, 1))
    out, _ = F.multi_head_attention_forward(
        turned, *others, size, number, w, b, None, None, False, 0.0, w_out, b_out,
        training=False, need_weights=False,
    )  # fmt: skip
    return out.transpose(0, 1)


@operation("_transformer_encoder_layer_fwd")
def encoder_layer(
    trace: Trace, out: Tensor, x: Tensor, size: int, number: int, w: Tensor, b: Tensor,
    w_out: Tensor, b_out: Tensor, gelu: bool, norm_first: bool, eps: float, *tensors: Any,
    **__: Any,
) -> Label | None:  # fmt: skip
    """What ``nn.TransformerEncoderLayer`` takes in evaluation, in one operator."""

    def layer(x, w, b, w_out, b_out, n1, c1, n2, c2, w1, b1, w2, b2):
        def attend(x):
            return _heads(size, number, x, x, x, w, b, w_out, b_out)

        def feed(x):
            y = F.linear(x, w1, b1)
            return F.linear(F.gelu(y) if gelu else F.relu(y), w2, b2)

        def norm(x, weight, bias):
            return F.layer_norm(x, (size,), weight, bias, eps)

        if norm_first:
            x = x + attend(norm(x, n1, c1))
            return x + feed(norm(x, n2, c2))
        x = norm(x + attend(x), n1, c1)
        return norm(x + feed(x), n2, c2)

    return _replayed(trace, layer, x, w, b, w_out, b_out, *tensors[:8])


# Norms -----------------------------------------------------------------------------------------


@operation(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "cudnn_batch_norm",
    "miopen_batch_norm", "batch_norm", "_batch_norm_no_update",
)  # fmt: skip
def batch_norm(
    trace: Trace, out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any
):
    """A scale and a shift for each channel."""
    return trace.bias(trace.scale(trace.label(x), 1, weight), 1, bias)


@operation("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(
    trace: Trace, out: Tensor, x: Tensor, shape: Any, weight: Tensor | None = None,
    bias: Any = None, *_: Any,
):  # fmt: skip
    """A scale and a shift for each entry of the last axis."""
    label = trace.mixed(trace.label(x), range(-len(shape), 0))
    if label is None:
        return None
    if len(shape) > 1:
        label = label if weight is None else trace.added(label, weight, "product")
        return label if label is None or bias is None else trace.added(label, bias)
    label = trace.scale(label, -1, weight)
    return trace.bias(label, -1, bias if isinstance(bias, Tensor) else None)


@operation("native_group_norm", "group_norm")
def group_norm(
    trace: Trace, out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes: Any
):
    """A scale and a shift for each channel, behind statistics that a group of channels shares."""
    groups, before = sizes[3], trace.label(x)
    label = trace.bias(trace.scale(before, 1, weight), 1, bias)
    if label is None or len(before.axes[1]) != 1 or before.axes[1][0].set is None:
        return label
    if groups == 1:
        return label if trace.mixed(before, [1]) is before else None
    (channels,) = before.axes[1]
    within = channels.size // groups
    group, channel = channels.cut(within)
    grouped = Label(((group,), (channel,)), before.start)
    statistics = trace.reduce(grouped, [1], "statistics")
    after = label.axes[1][0].cut(within)
    met = statistics and trace.meet(
        Label(((after[0],), (after[1],)), label.start), statistics, (groups, within), "sum"
    )
    return label.with_axis(1, (Factor(channels.size, met.sets()[0], 1),)).only() if met else None


# Reductions, and other shapes ------------------------------------------------------------------


@operation("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax", axes=True)
def softmax(trace: Trace, out: Tensor, x: Tensor, axes: list[int]) -> Label | None:
    """Each entry beside all of those along an axis."""
    return trace.mixed(trace.label(x), axes)


@operation(
    "mean", "sum", "prod", "amax", "amin", "max", "min", "any", "all", "var", "std", "logsumexp",
    "norm", "linalg_vector_norm", "count_nonzero", "nansum", "nanmean", "aminmax", "median",
    "nanmedian", "var_mean", "std_mean", "argmax", "argmin", axes=True,
)  # fmt: skip
def reduction(trace: Trace, out: Tensor, x: Tensor, axes: list[int]) -> Label | None:
    """One number for all entries along some axes."""
    label = trace.reduce(trace.label(x), axes)
    if label is None or out.dim() == x.dim():
        return label
    return Label(tuple(a for i, a in enumerate(label.axes) if i not in axes), label.start)


@operation(
    "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "kthvalue",
    "mode", "flip", "roll", "index_select", axes=True,
)  # fmt: skip
def along(trace: Trace, out: Tensor, x: Tensor, axes: list[int]) -> Label | None:
    """Entries in another order, some of them, or running sums, along axes of data."""
    label = trace.label(x)
    if not _only_data(label, axes):
        return None
    if out.dim() < x.dim():
        return Label(tuple(a for i, a in enumerate(label.axes) if i not in axes), label.start)
    moved = (data(out.shape[i : i + 1]).axes[0] for i in range(out.dim()))
    return Label(
        tuple(
            new if i in axes else a
            for i, (new, a) in enumerate(zip(moved, label.axes, strict=True))
        ),
        label.start,
    )


@operation("gather")
def gather(trace: Trace, out: Tensor, x: Tensor, dim: int, index: Tensor, **_: Any) -> Label | None:
    """Entries picked along one axis, for each place along the others."""
    label = trace.label(x)
    (dim,) = _dims(x, dim)
    for i, axis in enumerate(label.axes):
        if i == dim or _only_data(label, [i]):
            continue
        picked_alike = index.stride(i) == 0 or trace.label(index).axes[i] == axis
        if index.shape[i] != x.shape[i] or not picked_alike:
            return None
    if not _only_data(label, [dim]):
        return None
    axes = (
        data((n,)).axes[0] if _only_data(label, [i]) else label.axes[i]
        for i, n in enumerate(out.shape)
    )
    return Label(tuple(axes), label.start)


@operation("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy")
def scatter(
    trace: Trace, out: Tensor, x: Tensor, dim: int, index: Tensor, new: Any, *_: Any, **__: Any
) -> Label | None:
    """Entries brought to other places along one axis of data."""
    if not isinstance(new, Tensor) or new.dim() != x.dim():
        return None
    (dim,) = _dims(x, dim)
    labels = [trace.operand(x), trace.operand(new)]
    alike = index.dim() < 2 or all(
        index.stride(i) == 0 or i == dim or _only_data(labels[1], [i]) for i in range(x.dim())
    )
    if not alike or any(
        n != m for i, (n, m) in enumerate(zip(x.shape, new.shape, strict=True)) if i != dim
    ):
        return None
    if not all(len(label.axes) == x.dim() and _only_data(label, [dim]) for label in labels):
        return None
    one, other = (label.with_axis(dim, ()) for label in labels)
    shape = [1 if i == dim else n for i, n in enumerate(out.shape)]
    met = trace.meet(one, other, shape, "sum")
    return met and met.with_axis(dim, data(out.shape[dim : dim + 1]).axes[0])


@operation("cat")
def cat(trace: Trace, out: Tensor, tensors: list[Tensor], dim: int = 0) -> Label | None:
    """Side by side."""
    return trace.cat(tensors, dim, out)


@operation("stack")
def stack(trace: Trace, out: Tensor, tensors: list[Tensor], dim: int = 0) -> Label | None:
    """Side by side along a new axis."""
    dim %= out.dim()
    pieces = []
    for t in tensors:
        piece = t.unsqueeze(dim)
        label = trace.label(t)
        trace.set_label(piece, Label((*label.axes[:dim], (), *label.axes[dim:]), label.start))
        pieces.append(piece)
    return trace.cat(pieces, dim, out)


@operation("constant_pad_nd")
def pad(trace: Trace, out: Tensor, x: Tensor, widths: list[int], *_: Any) -> Label | None:
    """Neurons of value zero before and behind those along an axis."""
    label = trace.label(x)
    axes = list(label.axes)
    for axis in range(x.dim()):
        factors, size = label.axes[axis], out.shape[axis]
        if size == x.shape[axis]:
            continue
        if all(f.set is None for f in factors):
            axes[axis] = (Factor(size),)
            continue
        before = widths[2 * (x.dim() - 1 - axis)]
        (source,) = {f.set for f in factors}
        others = [f.set for i, a in enumerate(label.axes) if i != axis for f in a]
        if source is None or source in others or before < 0 or size < x.shape[axis]:
            return None
        target = trace.builder.new_meeting("padding", size)
        large = numbered([f.size for f in factors], target)
        starts = (before, label.start.get(source, 0))
        if not trace.builder.relate(large, factors, starts, True, "padding"):
            return None
        axes[axis] = (Factor(size, target, 1),)
    return Label(tuple(axes), label.start).only()


@operation("index", "index_put")
def index(
    trace: Trace, out: Tensor, x: Tensor, indices: list[Tensor | None], new: Any = None, *_: Any
) -> Label | None:
    """Entries picked, or written, along some axes by tensors of indices."""
    label, at, picked = trace.label(x), 0, {}
    for each in indices:
        masked = each.dim() if each is not None and each.dtype in (torch.bool, torch.uint8) else 1
        if each is not None:
            picked |= dict.fromkeys(range(at, at + masked))
        at += masked
    if new is None and trace.is_weight(x) and list(picked) == [0] and x.dim() == 2:
        return trace.lookup(indices[0], x)
    if not _only_data(label, picked):
        return None
    first = min(picked, default=0)
    behind = [i for i in range(x.dim()) if i >= first and i not in picked]
    together = list(picked) == list(range(first, first + len(picked)))
    before = list(range(first)) if together else []
    behind = behind if together else [i for i in range(x.dim()) if i not in picked]
    kept = (*(label.axes[i] for i in before), *(label.axes[i] for i in behind))
    if isinstance(new, Tensor):
        return _put(trace, out, label, trace.operand(new), before, behind)
    count = out.dim() - len(kept)
    middle = data(out.shape[len(before) : len(before) + count]).axes
    return Label((*kept[: len(before)], *middle, *kept[len(before) :]), label.start).only()


def _put(
    trace: Trace, out: Tensor, label: Label, new: Label, before: list[int], behind: list[int]
) -> Label | None:
    """Neurons written into a tensor: along axes that all of them have they are the tensor's own."""
    if (before and new.sets()) or len(new.axes) < len(behind):
        return None
    if new.sets() and not _only_data(new, range(len(new.axes) - len(behind))):
        return None
    rest = len(new.axes) - len(behind)
    inner = Label(tuple(new.axes[rest:]), new.start)
    shape = [out.shape[i] for i in behind]
    if inner.sets() and list(inner.shape) != shape:
        return None
    mine = Label(tuple(label.axes[i] for i in behind), label.start).only()
    if not mine.sets():  # what is written over has no order that would matter
        mine = data((1,) * len(behind))
    met = trace.meet(mine, inner, shape, "sum") if behind else mine
    if met is None:
        return None
    axes = list(label.axes)
    for i, axis in zip(behind, met.axes, strict=True):
        axes[i] = axis
    return Label(tuple(axes), {**label.start, **met.start}).only()


@operation("copy")
def copy(trace: Trace, out: Tensor, x: Tensor, new: Tensor, *_: Any) -> Label | None:
    """Written over as a whole."""
    if trace.is_weight(new):
        trace.derive(out, trace.weights(new))
        return None
    return trace.meet(trace.label(new), data((1,) * out.dim()), out.shape, "sum")


@operation("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(trace: Trace, out: Tensor, x: Tensor, groups: int) -> Label | None:
    """Channels of all groups by turns."""
    return _replayed(trace, lambda t: t.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2), x)


@operation("pixel_unshuffle")
def pixel_unshuffle(trace: Trace, out: Tensor, x: Tensor, factor: int) -> Label | None:
    """The pixels of each square are channels, those of a channel together."""

    def squares(t: Tensor) -> Tensor:
        t = t.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor))
        return t.movedim((-3, -1), (-4, -3)).flatten(-5, -3)

    return _replayed(trace, squares, x)


@operation("pixel_shuffle")
def pixel_shuffle(trace: Trace, out: Tensor, x: Tensor, factor: int) -> Label | None:
    """The channels that lie together are the pixels of each square of one channel."""
    label, builder = trace.label(x), trace.builder
    (*_, channels), square = label.axes[:-2], factor**2
    if not _only_data(label, [-2, -1]) or len(channels) != 1 or channels[0].size < square:
        return None
    # Each of a square has its own place in it.
    own, target = builder.ordered("places", square).set, builder.new_meeting("square", x.shape[-3])
    large = numbered([x.shape[-3] // square, square], target)
    if not builder.copy(label, channels[0].cut(square), large, 0, "square"):
        return None
    if not builder.relate(
        large, [Factor(large[0].size), Factor(square, own, 1)], (0, 0), True, "square"
    ):
        return None
    met = trace.reduce(Label(tuple((f,) for f in large)), [1], "square")
    rest = data(out.shape[-2:]).axes
    return met and Label((*label.axes[:-3], met.axes[0], *rest), label.start | met.start).only()


@operation("glu")
def glu(trace: Trace, out: Tensor, x: Tensor, dim: int = -1) -> Label | None:
    """The first half along an axis, times a function of the second."""
    return _replayed(trace, lambda t: _glu(t, dim), x)


def _glu(x: Tensor, axis: int) -> Tensor:
    value, gate = x.chunk(2, axis)
    return value * gate.sigmoid()
