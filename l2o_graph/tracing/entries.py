"""What operators that work entry by entry do to neurons."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from l2o_graph.tracing.builder import Weight
from l2o_graph.tracing.labels import Factor, Label, data
from l2o_graph.tracing.trace import Trace

SUMS = {"add", "sub", "rsub"}
# What makes a weight out of a parameter, besides what works entry by entry.
OF_WEIGHTS = {
    "_native_batch_norm_legit", "_softmax", "_weight_norm_interface", "cudnn_batch_norm",
    "native_batch_norm", "native_group_norm", "native_layer_norm", "_fused_rms_norm",
    "_batch_norm_with_update", "_native_batch_norm_legit_functional",
}  # fmt: skip


def follow_entries(trace: Trace, name: str, inputs: list[Tensor], outs: list[Tensor]) -> None:
    """Say what comes of tensors entry by entry, after broadcasting."""
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
        elif parameters and (label := _met(trace, name, parameters, numbers, out)):
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


def _met(
    trace: Trace, name: str, parameters: Sequence[Tensor], numbers: Sequence[Tensor], out: Tensor
) -> Label | None:
    """A parameter that meets numbers which are no weight: inputs, or a mask of tokens.

    Along an axis where they are all the same it has neurons of its own, as centres or frequencies
    have that all inputs meet; a vector along an axis of inputs sits on these.
    """
    p, *others = parameters
    wide = [i - p.dim() for i, n in enumerate(p.shape) if n > 1]
    told = [t for t in numbers if not trace.statistics.get(t)]
    if others or not told or len(trace.weights(p)) != 1 or p.shape == out.shape:
        return None
    free = [i for i in wide if all(t.dim() < -i or t.shape[i] == 1 for t in told)]
    if len(free) == 1:
        size, axis = out.shape[free[0]], out.dim() + free[0]
        own = trace.builder.new_set(trace.name(trace.weights(p)), size)
        return trace.added(data(out.shape).with_axis(axis, (Factor(size, own, 1),)), p)
    if free or len(wide) != 1 or len(told) != 1 or told[0].shape != out.shape:
        return None
    read = trace.builder.read(trace.label(told[0]), wide[0], trace.name(trace.weights(p)))
    if read is None:
        return None
    trace.set_label(told[0], read[0])
    return _entries(trace, name, list(told), [p], [], out)


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
