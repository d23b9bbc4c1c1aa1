"""Rules of normalization operators."""

from typing import Any

from torch import Tensor

from l2o_graph.tracing.labels import Factor, Label, require
from l2o_graph.tracing.operations import operation
from l2o_graph.tracing.trace import Trace


@operation(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "cudnn_batch_norm",
    "miopen_batch_norm", "batch_norm", "_batch_norm_no_update",
)  # fmt: skip
def batch_norm(
    trace: Trace, out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any
):
    """Follow a batch norm: a scale and a shift per channel, (N, C, *)."""
    return trace.bias(trace.scale(trace.label(x), 1, weight), 1, bias)


@operation("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(
    trace: Trace, out: Tensor, x: Tensor, shape: Any, weight: Tensor | None = None,
    bias: Any = None, *_: Any,
):  # fmt: skip
    """Follow a layer norm or RMS norm: a scale and a shift per entry of the last axes."""
    label = trace.mixed(trace.label(x), range(-len(shape), 0))
    bias = bias if isinstance(bias, Tensor) else None  # RMS norms have eps here
    if len(shape) > 1:
        return trace.add_parameter(trace.add_parameter(label, weight, "product"), bias)
    label = trace.scale(label, -1, weight)
    return trace.bias(label, -1, bias)


@operation("native_group_norm", "group_norm")
def group_norm(
    trace: Trace, out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes: Any
):
    """Follow a group norm, (N, C, *): a node for each group's statistics, scales and shifts."""
    groups, before = sizes[3], trace.label(x)
    label = trace.bias(trace.scale(before, 1, weight), 1, bias)
    if len(before.axes[1]) != 1 or before.axes[1][0].set is None:
        return label
    if groups == 1:
        require(trace.mixed(before, [1]) is before)
        return label
    (channels,) = before.axes[1]
    within = channels.size // groups
    group, channel = channels.split(within)
    grouped = Label(((group,), (channel,)), before.start)
    statistics = trace.reduce(grouped, [1], "statistics")
    after = label.axes[1][0].split(within)
    channel_label = Label(((after[0],), (after[1],)), label.start)
    met = trace.combine(channel_label, statistics, (groups, within), "sum")
    return label.with_axis(1, (Factor(channels.size, met.sets()[0], 1),)).pruned()
