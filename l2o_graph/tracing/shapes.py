"""Rules of reductions, indexing, concatenation and rearrangement."""

from typing import Any

import torch
from torch import Tensor

from l2o_graph.tracing.builder import row_major
from l2o_graph.tracing.dispatch import replay
from l2o_graph.tracing.labels import Factor, Label, NotFollowed, broadcast, data, require
from l2o_graph.tracing.operations import dims_of, is_data, operation
from l2o_graph.tracing.trace import Trace


@operation("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax", axes=True)
def softmax(trace: Trace, out: Tensor, x: Tensor, axes: list[int]) -> Label:
    """Follow a softmax along an axis."""
    return trace.mixed(trace.label(x), axes)


@operation(
    "mean", "sum", "prod", "amax", "amin", "max", "min", "any", "all", "var", "std", "logsumexp",
    "norm", "linalg_vector_norm", "count_nonzero", "nansum", "nanmean", "aminmax", "median",
    "nanmedian", "var_mean", "std_mean", "argmax", "argmin", axes=True,
)  # fmt: skip
def reduction(trace: Trace, out: Tensor, x: Tensor, axes: list[int]) -> Label:
    """Follow a reduction along axes."""
    label = trace.reduce(trace.label(x), axes)
    return label if out.dim() == x.dim() else label.drop_axes(axes)


@operation(
    "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk", "kthvalue",
    "mode", "flip", "roll", axes=True,
)  # fmt: skip
def along(trace: Trace, out: Tensor, x: Tensor, axes: list[int]) -> Label:
    """Follow a scan, sort, selection or permutation along axes of data."""
    label = trace.label(x)
    require(is_data(label, axes))
    if out.dim() < x.dim():
        return label.drop_axes(axes)
    for i in axes:
        label = label.with_axis(i, data((out.shape[i],)).axes[0])
    return label


@operation("index_select")
def index_select(trace: Trace, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Label:
    """Follow the selection of entries along one axis; rows of a parameter are a table lookup."""
    if trace.is_weight(x) and x.dim() == 2 and dim == 0:
        return trace.lookup(index, x)
    return along(trace, out, x, dims_of(x, dim))


@operation("gather")
def gather(trace: Trace, out: Tensor, x: Tensor, dim: int, index: Tensor, **_: Any) -> Label:
    """Follow the selection of entries along one axis, separately for each entry of the others."""
    label = trace.label(x)
    (dim,) = dims_of(x, dim)
    for i, axis in enumerate(label.axes):
        if i == dim or is_data(label, [i]):
            continue
        same_index = index.stride(i) == 0 or trace.label(index).axes[i] == axis
        require(index.shape[i] == x.shape[i] and same_index)
    require(is_data(label, [dim]))
    axes = (
        data((n,)).axes[0] if is_data(label, [i]) else label.axes[i]
        for i, n in enumerate(out.shape)
    )
    return Label(tuple(axes), label.start)


@operation("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy")
def scatter(
    trace: Trace, out: Tensor, x: Tensor, dim: int, index: Tensor, new: Any, *_: Any, **__: Any
) -> Label:
    """Follow writes of entries to other places along one axis of data."""
    if not isinstance(new, Tensor) or new.dim() != x.dim():
        raise NotFollowed
    (dim,) = dims_of(x, dim)
    labels = [trace.operand(x), trace.operand(new)]
    others = [i for i in range(x.dim()) if i != dim]
    axes_of_data = (index.stride(i) == 0 or is_data(labels[1], [i]) for i in others)
    require(index.dim() < 2 or all(axes_of_data))
    require(all(x.shape[i] == new.shape[i] for i in others))
    require(all(is_data(label, [dim]) for label in labels))
    one, other = (label.with_axis(dim, ()) for label in labels)
    shape = [1 if i == dim else n for i, n in enumerate(out.shape)]
    return trace.combine(one, other, shape, "sum").with_axis(dim, data(out.shape).axes[dim])


@operation("cat")
def cat(trace: Trace, out: Tensor, tensors: list[Tensor], dim: int = 0) -> Label | None:
    """Follow a concatenation."""
    return trace.cat(tensors, dim, out)


@operation("stack")
def stack(trace: Trace, out: Tensor, tensors: list[Tensor], dim: int = 0) -> Label | None:
    """Follow a stack as a concatenation along a new axis."""
    dim %= out.dim()
    pieces = []
    for t in tensors:
        piece = t.unsqueeze(dim)
        label = trace.label(t)
        trace.set_label(piece, Label((*label.axes[:dim], (), *label.axes[dim:]), label.start))
        pieces.append(piece)
    return trace.cat(pieces, dim, out)


@operation("constant_pad_nd")
def pad(trace: Trace, out: Tensor, x: Tensor, widths: list[int], *_: Any) -> Label:
    """Follow padding; along neurons, it adds neurons before and after them."""
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
            raise NotFollowed
        target = trace.builder.new_merge("padding", size)
        large = row_major([f.size for f in factors], target)
        starts = (before, label.start.get(source, 0))
        trace.builder.connect(large, factors, starts, True, "padding")
        axes[axis] = (Factor(size, target, 1),)
    return Label(tuple(axes), label.start).pruned()


@operation("index", "index_put")
def index(
    trace: Trace, out: Tensor, x: Tensor, indices: list[Tensor | None], new: Any = None, *_: Any
) -> Label:
    """Follow reads and writes at index tensors along some axes."""
    label, at, picked = trace.label(x), 0, {}
    for each in indices:
        masked = each.dim() if each is not None and each.dtype in (torch.bool, torch.uint8) else 1
        if each is not None:
            picked |= dict.fromkeys(range(at, at + masked))
        at += masked
    one = indices[0] if list(picked) == [0] else None
    if new is None and one is not None and trace.is_weight(x) and x.dim() == 2:
        return trace.lookup(one, x)
    require(is_data(label, picked))
    first = min(picked, default=0)
    is_adjacent = list(picked) == list(range(first, first + len(picked)))
    before = list(range(first)) if is_adjacent else []  # else new axes come first
    behind = [i for i in range(len(before), x.dim()) if i not in picked]
    if isinstance(new, Tensor):
        answer = _put(trace, out, label, trace.operand(new), before, behind)
        if not trace.is_weight(new):
            return answer
        require(behind == list(range(x.dim()))[-new.dim() :])
        # Writing a parameter over neurons has the symmetries of adding it.
        return trace.add_parameter(answer, new)
    middle = data(out.shape[len(before) : out.dim() - len(behind)]).axes
    axes = (*label.axes[: len(before)], *middle, *(label.axes[i] for i in behind))
    return Label(axes, label.start).pruned()


def _put(
    trace: Trace, out: Tensor, label: Label, new: Label, before: list[int], behind: list[int]
) -> Label:
    """Combine written neurons with those of the tensor along shared axes."""
    rest = len(new.axes) - len(behind)
    require(rest >= 0 and (not new.sets() or (not before and is_data(new, range(rest)))))
    inner = Label(tuple(new.axes[rest:]), new.start)
    shape = [out.shape[i] for i in behind]
    require(not inner.sets() or list(inner.shape) == shape)
    mine = Label(tuple(label.axes[i] for i in behind), label.start).pruned()
    if not mine.sets():  # overwritten data does not distinguish neurons
        mine = data((1,) * len(behind))
    met = trace.combine(mine, inner, shape, "sum") if behind else mine
    axes = list(label.axes)
    for i, axis in zip(behind, met.axes, strict=True):
        axes[i] = axis
    return Label(tuple(axes), {**label.start, **met.start}).pruned()


@operation("copy")
def copy(trace: Trace, out: Tensor, x: Tensor, new: Tensor, *_: Any) -> Label | None:
    """Follow ``x.copy_(new)``."""
    if trace.is_weight(new):
        if trace.label(x).sets():  # overwrites neurons
            return trace.add_parameter(trace.label(x), new)
        trace.derived.put(out, trace.weights(new))
        return None
    trace.builder.recent_reads.update(trace.label(x).sets())  # overwritten, not read
    return broadcast(trace.label(new), out.shape)


@operation("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(trace: Trace, out: Tensor, x: Tensor, groups: int) -> Label:
    """Follow a channel shuffle."""
    return replay(trace, lambda t: t.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2), x)


@operation("pixel_unshuffle")
def pixel_unshuffle(trace: Trace, out: Tensor, x: Tensor, factor: int) -> Label:
    """Follow a pixel unshuffle: the pixels of each square become adjacent channels."""

    def squares(t: Tensor) -> Tensor:
        t = t.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor))
        return t.movedim((-3, -1), (-4, -3)).flatten(-5, -3)

    return replay(trace, squares, x)


@operation("pixel_shuffle")
def pixel_shuffle(trace: Trace, out: Tensor, x: Tensor, factor: int) -> Label:
    """Follow a pixel shuffle: adjacent channels become the pixels of squares of a channel."""
    label, builder = trace.label(x), trace.builder
    (*_, channels), square = label.axes[:-2], factor**2
    require(is_data(label, [-2, -1]) and len(channels) == 1 and channels[0].size >= square)
    # Positions within a square are distinguishable.
    own, target = builder.new_inputs("places", square), builder.new_merge("square", x.shape[-3])
    large = row_major([x.shape[-3] // square, square], target)
    builder.copy(label, channels[0].split(square), large, 0, "square")
    small = [Factor(large[0].size), Factor(square, own, 1)]
    builder.connect(large, small, (0, 0), True, "square")
    met = trace.reduce(Label(tuple((f,) for f in large)), [1], "square")
    rest = data(out.shape[-2:]).axes
    return Label((*label.axes[:-3], met.axes[0], *rest), label.start | met.start).pruned()


@operation("glu")
def glu(trace: Trace, out: Tensor, x: Tensor, dim: int = -1) -> Label:
    """Follow a gated linear unit."""

    def gated(t: Tensor) -> Tensor:
        value, gate = t.chunk(2, dim)
        return value * gate.sigmoid()

    return replay(trace, gated, x)
