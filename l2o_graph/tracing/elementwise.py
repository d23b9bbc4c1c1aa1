"""Rule of elementwise operators."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from l2o_graph.tracing.labels import Factor, Label, broadcast, data
from l2o_graph.tracing.trace import Trace
from l2o_graph.tracing.weight import Weight

SUMS = {"add", "sub", "rsub"}
# Other operators that compute a weight from a parameter of the same shape.
OF_WEIGHTS = {
    "_native_batch_norm_legit", "_softmax", "_weight_norm_interface", "cudnn_batch_norm",
    "native_batch_norm", "native_group_norm", "native_layer_norm", "_fused_rms_norm",
    "_batch_norm_with_update", "_native_batch_norm_legit_functional",
}  # fmt: skip


def follow_elementwise(trace: Trace, name: str, inputs: list[Tensor], outs: list[Tensor]) -> None:
    """Follow an elementwise operator, with broadcasting."""
    labelled = [t for t in inputs if trace.label(t).sets()]
    parameters = [t for t in inputs if trace.is_weight(t)]
    constants = [
        t
        for t in inputs
        if not trace.label(t).sets() and not trace.weights(t) and not trace.is_exchangeable(t)
    ]
    for out in outs:
        if labelled:
            trace.set_label(out, _combined(trace, name, labelled, parameters, constants, out))
        elif parameters and (label := _merge_with_input(trace, name, parameters, constants, out)):
            trace.set_label(out, label)
        elif parameters:
            parameters = sorted(parameters, key=lambda t: t.shape != out.shape)
            made_of = [_broadcast(w, name, out) for t in parameters for w in trace.weights(t)]
            if name in OF_WEIGHTS:
                masked = not trace.keeps_axes(parameters[0])
            else:
                masked = not all(trace.statistics.get(t) for t in constants)
            masked |= None in made_of
            if parameters[0].shape == out.shape:
                found = dict.fromkeys(w for w in made_of if w is not None)
                trace.derived.put(out, [replace(w, masked=w.masked or masked) for w in found])


def _merge_with_input(
    trace: Trace, name: str, parameters: Sequence[Tensor], constants: Sequence[Tensor], out: Tensor
) -> Label | None:
    """Combine a parameter with inputs or other data; None if it stays a weight.

    Along an axis where the data is broadcast, the parameter gets a set of its own, as for centres
    or frequencies that are combined with all inputs. A vector along an axis of inputs scales or
    shifts these.
    """
    p, *others = parameters
    wide = [i - p.dim() for i, n in enumerate(p.shape) if n > 1]
    inputs = [t for t in constants if not trace.statistics.get(t)]
    if others or not inputs or len(trace.weights(p)) != 1 or p.shape == out.shape:
        return None
    free = [i for i in wide if all(t.dim() < -i or t.shape[i] == 1 for t in inputs)]
    if len(free) == 1:
        size, axis = out.shape[free[0]], out.dim() + free[0]
        own = trace.builder.new_set(trace.layer_name(trace.weights(p)), size)
        return trace.add_parameter(data(out.shape).with_axis(axis, (Factor(size, own, 1),)), p)
    if free or len(wide) != 1 or len(inputs) != 1 or inputs[0].shape != out.shape:
        return None
    (x,), layer = inputs, trace.layer_name(trace.weights(p))
    trace.set_label(x, trace.builder.read_axis(trace.label(x), wide[0], layer).label)
    return _combined(trace, name, inputs, [p], [], out)


def _broadcast(weight: Weight, name: str, out: Tensor) -> Weight | None:
    """Expand a weight to the shape of an output; weights of norms are aligned with channels."""
    channels = ("batch_norm" in name or "group_norm" in name) and len(weight.shape) == 1
    return weight.broadcast(tuple(out.shape), 1 if channels else None)


def _combined(
    trace: Trace, name: str, labelled: list[Tensor], parameters: list[Tensor],
    constants: list[Tensor], out: Tensor,
) -> Label:  # fmt: skip
    """Combine labelled tensors, parameters and other data into the label of the output."""
    kind = "sum" if name in SUMS else "product"
    first, *others = labelled
    answer = broadcast(trace.label(first), out.shape)
    for t in (*others, *constants):
        answer = trace.combine(answer, trace.label(t), out.shape, kind)
    for p in parameters:
        wide = [i - p.dim() for i, n in enumerate(p.shape) if n > 1]
        if kind == "sum":
            answer = trace.add_parameter(answer, p)
        elif len(wide) == 1 and answer.axes[wide[0]]:
            answer = trace.scale(answer, wide[0], p, "scale")
        elif wide:
            answer = trace.add_parameter(answer, p, "product")
        else:
            trace.numbers |= trace.parameters_of([p])
    return answer
