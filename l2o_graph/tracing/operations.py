"""What each of torch's own operations does to neurons.

Names are those of the ATen operators, to which torch brings every module and function; an
operator without a rule here is taken entry by entry where shapes allow it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from l2o_graph.architecture import ACTIVATIONS
from l2o_graph.tracing.builder import Weight, numbered
from l2o_graph.tracing.labels import Factor, Label, data, viewed
from l2o_graph.tracing.trace import Trace

Operation = Callable[..., Label | None]
OPERATIONS: dict[str, Operation] = {}

SUMS = {"add", "sub", "rsub"}
OTHER_NAMES = {"log_sigmoid_forward": "logsigmoid"}  # of functions


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Make a function the rule of operators: (trace, out, *args, **kwargs) -> label of out."""

    def add(rule: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, rule))
        return rule

    return add


def follow(trace: Trace, operator: Any, args: tuple, kwargs: dict, out: Any) -> None:
    """Say what the outputs of an operator are."""
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if not outs:
        return
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    before = {s for t in inputs for s in trace.label(t).sets()}
    for t in inputs:
        trace.weights(t)  # notes that it is used
    trace.builder.touched.clear()
    name = operator.overloadpacket.__name__.removesuffix("_")
    if name.startswith("_scaled_dot_product"):
        name = "_scaled_dot_product"
    if operator.is_view or name == "_unsafe_view":
        _follow_view(trace, operator, args, kwargs, outs)
    elif name in OPERATIONS:
        trace.set_label(outs[0], OPERATIONS[name](trace, outs[0], *args, **kwargs))
    else:
        _follow_entries(trace, name, tree_leaves((args, kwargs)), outs)
    function = OTHER_NAMES.get(name, name)
    if function in ACTIVATIONS:
        trace.activated(trace.label(outs[0]), function)
    after = {s for t in outs for s in trace.label(t).sets()}
    for s in before - after - trace.builder.touched:
        trace.builder.sets[s].lost = True


def _follow_view(trace: Trace, operator: Any, args: tuple, kwargs: dict, outs: list) -> None:
    x = args[0]
    label, made_of = trace.label(x), trace.weights(x)
    if label.sets():
        stand_in = torch.empty(x.shape, device="meta")
        views = tree_leaves(operator(stand_in, *args[1:], **kwargs))
        for out, view in zip(outs, views, strict=True):
            trace.set_label(out, viewed(label, view))
    elif made_of and not trace.weights(outs[0]):  # a view of a computed weight
        for i, out in enumerate(outs):
            views = []
            for w in made_of:
                if len(w.shape) == x.dim() and (w.shape == tuple(x.shape) or len(outs) == 1):
                    view = tree_leaves(operator(_stand_in(w), *args[1:], **kwargs))[i]
                    at, shape, strides = view.storage_offset(), view.shape, view.stride()
                    views.append(Weight(w.parameter, at, tuple(shape), tuple(strides)))
            trace.derive(out, views)


def _stand_in(weight: Weight) -> Tensor:
    """A tensor without numbers that lies in its storage as a weight lies in its parameter."""
    steps = zip(weight.shape, weight.strides, strict=True)
    last = weight.start + sum((n - 1) * stride for n, stride in steps)
    storage = torch.empty(last + 1, device="meta")
    return storage.as_strided(weight.shape, weight.strides, weight.start)


def _follow_entries(trace: Trace, name: str, leaves: list, outs: list[Tensor]) -> None:
    """Entry by entry, or along the axes that stay as they are."""
    inputs = [t for t in leaves if isinstance(t, Tensor)]
    labelled = [t for t in inputs if trace.label(t).sets()]
    parameters = [t for t in inputs if not trace.label(t).sets() and trace.weights(t)]
    shape = _broadcast_shape(inputs)
    for out in outs:
        if labelled and tuple(out.shape) == shape:
            trace.set_label(out, _entries(trace, name, labelled, parameters, out))
        elif len(labelled) == 1 and out.dim() == labelled[0].dim():
            trace.set_label(out, _same_axes(trace.label(labelled[0]), out))
        elif parameters and not labelled:
            same = [t for t in parameters if t.shape == out.shape]
            others = [t for t in parameters if t.shape != out.shape]
            if same:
                made_of = [w for t in (*same, *others) for w in trace.weights(t)]
                trace.derive(out, list(dict.fromkeys(made_of)))


def _entries(
    trace: Trace, name: str, labelled: list[Tensor], parameters: list[Tensor], out: Tensor
) -> Label | None:
    """Labels of several tensors, met, and parameters added to them or multiplied with them."""
    kind = "sum" if name in SUMS else "product"
    first, *others = labelled
    answer: Label | None = trace.meet(trace.label(first), data(out.shape), out.shape, kind)
    for t in others:
        if answer is not None:
            answer = trace.meet(answer, trace.label(t), out.shape, kind)
    for p in parameters:
        if answer is None:
            break
        if kind == "sum":
            trace.parameter_along(answer, p)
        else:
            axis = _axis_of_neurons(answer, p)
            if axis is not None:
                stand_in = torch.empty(answer.shape, device="meta")
                trace.set_label(stand_in, answer)
                answer = trace.scale(stand_in, axis, p, "scale")
    return answer


def _axis_of_neurons(label: Label, parameter: Tensor) -> int | None:
    """The axis, from the last, of the only run of neurons that a vector is aligned with."""
    wide = [axis - parameter.dim() for axis, n in enumerate(parameter.shape) if n > 1]
    return wide[0] if len(wide) == 1 and label.axes[wide[0]] else None


def _same_axes(label: Label, out: Tensor) -> Label | None:
    """The same axes, those of data of another length."""
    axes = []
    for factors, before, after in zip(label.axes, label.shape, out.shape, strict=True):
        if before != after and any(f.set is not None for f in factors):
            return None
        axes.append(factors if before == after else data((after,)).axes[0])
    return Label(tuple(axes), label.start).only()


def _broadcast_shape(tensors: list[Tensor]) -> tuple[int, ...] | None:
    try:
        return tuple(torch.broadcast_shapes(*[t.shape for t in tensors]))
    except RuntimeError:
        return None


# Products --------------------------------------------------------------------------------------


@operation("mm", "bmm", "matmul")
def product(trace: Trace, out: Tensor, a: Tensor, b: Tensor) -> Label | None:
    """A product of matrices, one of them perhaps a parameter."""
    if trace.weights(b) and not trace.label(b).sets():
        b = b[0] if b.dim() == 3 and b.stride(0) == 0 else b
        return trace.dense(a, -1, b, transposed=True) if b.dim() == 2 else None
    if trace.weights(a) and not trace.label(a).sets():
        a = a[0] if a.dim() == 3 and a.stride(0) == 0 else a
        return trace.dense(b, -2, a) if a.dim() == 2 else None
    return trace.contract(trace.label(a), trace.label(b))


@operation("addmm", "baddbmm")
def product_and_sum(trace: Trace, out: Tensor, c: Tensor, a: Tensor, b: Tensor, **_: Any):
    """A product of matrices with something added, mostly a bias."""
    label = product(trace, out, a, b)
    if label is None:
        return None
    if trace.weights(c):
        trace.parameter_along(label, c)
        return label
    return trace.meet(label, trace.label(c), out.shape, "sum")


@operation("linear")
def linear(trace: Trace, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None):
    """The last axis mapped."""
    label = trace.dense(x, -1, weight)
    trace.bias(label, -1, bias)
    return label


@operation("convolution", "_convolution")
def convolution(
    trace: Trace, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Label | None:
    """Channels mapped, the axes behind them moved."""
    transposed, groups = rest[3], rest[5]
    label = trace.dense(x, 1, weight, transposed, groups, "convolution")
    if label is None:
        return None
    trace.bias(label, 1, bias)
    return Label((*label.axes[:2], *data(out.shape[2:]).axes), label.start)


@operation("embedding")
def embedding(trace: Trace, out: Tensor, table: Tensor, index: Tensor, *_: Any) -> Label | None:
    """Rows of a table."""
    return trace.lookup(index, table)


@operation("_scaled_dot_product")
def attention(trace: Trace, out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any):
    """softmax(q k') v, head by head: products are summed within a head and weigh its values."""
    query, key, value = (trace.label(t) for t in (q, k, v))
    key = Label((*key.axes[:-2], key.axes[-1], key.axes[-2]), key.start)
    scores = trace.contract(query, key)
    return None if scores is None else trace.contract(scores, value)


# Norms -----------------------------------------------------------------------------------------


@operation(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "cudnn_batch_norm",
    "miopen_batch_norm", "batch_norm",
)  # fmt: skip
def batch_norm(
    trace: Trace, out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any
):
    """A scale and a shift for each channel."""
    label = trace.scale(x, 1, weight)
    trace.bias(label, 1, bias)
    return label


@operation("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(
    trace: Trace, out: Tensor, x: Tensor, shape: Any, weight: Tensor | None = None,
    bias: Any = None, *_: Any,
):  # fmt: skip
    """A scale and a shift for each entry of the last axis."""
    if len(shape) > 1:
        return trace.label(x)
    label = trace.scale(x, -1, weight)
    trace.bias(label, -1, bias if isinstance(bias, Tensor) else None)
    return label


@operation("native_group_norm", "group_norm")
def group_norm(
    trace: Trace, out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes: Any
):
    """A scale and a shift for each channel, behind statistics that a group of channels shares."""
    groups, before = sizes[3], trace.label(x)
    label = trace.scale(x, 1, weight)
    trace.bias(label, 1, bias)
    if groups == 1 or label is None or len(before.axes[1]) != 1 or before.axes[1][0].set is None:
        return label
    (channels,) = before.axes[1]
    within = channels.size // groups
    grouped = Label(((channels.cut(within)[0],), (channels.cut(within)[1],)), before.start)
    statistics = trace.reduce(grouped, [1], "statistics")
    after = label.axes[1][0].cut(within)
    met = statistics and trace.meet(
        Label(((after[0],), (after[1],)), label.start), statistics, (groups, within), "sum"
    )
    return label.with_axis(1, (Factor(channels.size, met.sets()[0], 1),)).only() if met else None


# Reductions, and other shapes ------------------------------------------------------------------


@operation(
    "mean", "sum", "prod", "amax", "amin", "max", "min", "any", "all", "var", "std", "logsumexp",
    "norm", "linalg_vector_norm", "count_nonzero",
)  # fmt: skip
def reduction(trace: Trace, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Label | None:
    """One number for all entries along some axes."""
    axes = kwargs.get("dim", next((a for a in args if isinstance(a, list | tuple)), None))
    axes = list(range(x.dim())) if not axes else [axes] if isinstance(axes, int) else list(axes)
    label = trace.reduce(trace.label(x), axes)
    if label is None or out.dim() == x.dim():
        return label
    gone = {axis % x.dim() for axis in axes}
    kept = tuple(axis for i, axis in enumerate(label.axes) if i not in gone)
    return Label(kept, label.start)


@operation("cat")
def cat(trace: Trace, out: Tensor, tensors: list[Tensor], dim: int = 0) -> Label | None:
    """Side by side."""
    return trace.cat(tensors, dim, out)


@operation("stack")
def stack(trace: Trace, out: Tensor, tensors: list[Tensor], dim: int = 0) -> Label | None:
    """Side by side along a new axis."""
    return trace.cat([t.unsqueeze(dim) for t in tensors], dim, out)


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
        (source,) = {f.set for f in factors}
        before = widths[2 * (x.dim() - 1 - axis)]
        target = trace.builder.new_meeting("padding", size)
        large = numbered([f.size for f in factors], target)
        starts = (before, label.start.get(source, 0) if source is not None else 0)
        if source is None or not trace.builder.relate(large, factors, starts, True, "padding"):
            return None
        axes[axis] = (Factor(size, target, 1),)
    return Label(tuple(axes), label.start).only()


@operation("index")
def index(trace: Trace, out: Tensor, x: Tensor, indices: list[Tensor | None]) -> Label | None:
    """Entries picked along the first axes by tensors of indices."""
    label = trace.label(x)
    picked = [i for i, each in enumerate(indices) if each is not None]
    if picked != list(range(len(picked))):
        return None
    if any(f.set is not None for axis in label.axes[: len(picked)] for f in axis):
        return None
    rest = label.axes[len(picked) :]
    return Label((*data(out.shape[: out.dim() - len(rest)]).axes, *rest), label.start)
