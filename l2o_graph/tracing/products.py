"""Rules of matrix products, linear layers, convolutions, tables and attention."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from l2o_graph.layout.spec import Kernel
from l2o_graph.tracing.builder import row_major
from l2o_graph.tracing.dispatch import replay
from l2o_graph.tracing.labels import Factor, Label, data, require
from l2o_graph.tracing.operations import is_data, operation
from l2o_graph.tracing.trace import Trace


@operation("mm", "bmm", "matmul", "_sparse_mm", "mv")
def product(trace: Trace, out: Tensor, a: Tensor, b: Tensor) -> Label:
    """Follow a matrix product; either factor may be a parameter."""
    of_a, of_b = trace.is_weight(a), trace.is_weight(b)
    if trace.folded.get(b) and not of_a and (b.dim() == 2 or len(b) == 1):
        return trace.dense_folded(a, b)
    require(not (of_a and of_b))
    if b.dim() == 1 and of_b:  # a vector, [in]: one output
        row = b[None]
        if not trace.weights(row):
            found = trace.weights(b)
            trace.derived.put(
                row, [replace(w, shape=(1, *w.shape), strides=(1, *w.strides)) for w in found]
            )
        return trace.dense(a, -1, row).drop_axes([a.dim() - 1]).pruned()
    if b.dim() == 1:
        require(of_a and b.numel() > 1)
        return trace.dense(b, -1, a)
    if of_b:
        matrix = _shared_matrix(trace, b)
        if matrix.dim() == 2:
            return trace.dense(a, -1, matrix, transposed=True)
        return _experts(trace, a, b)
    if of_a:
        matrix = _shared_matrix(trace, a)
        if matrix.dim() == 2:
            return trace.dense(b, -2, matrix)
        label = _experts(trace, b.mT, a.mT)
        return Label((label.axes[0], label.axes[2], label.axes[1]), label.start)
    return trace.contract(trace.operand(a), trace.operand(b))


def _shared_matrix(trace: Trace, weights: Tensor) -> Tensor:
    """Return the matrix that a batch of weights consists of if all are the same, else the batch."""
    if weights.dim() != 3 or (len(weights) > 1 and weights.stride(0) != 0):
        return weights
    one = weights[0]
    if not trace.weights(one):
        found = [
            replace(w, shape=w.shape[1:], strides=w.strides[1:]) for w in trace.weights(weights)
        ]
        trace.derived.put(one, found)
    return one


def _experts(trace: Trace, x: Tensor, weight: Tensor) -> Label:
    """Follow a batched product, (E, examples, in) with a parameter [E, in, out]: E experts."""
    require(x.dim() == 3)
    label, (first, *_) = trace.label(x), trace.weights(weight)
    experts, rows, columns = weight.shape
    from_rows = first.dense
    if not from_rows:  # stored as [E, out, in]
        first = first.transposed(1, 2)
    outer, inner = label.axes[0], label.axes[2]
    alone = len(trace.weights(weight)) == 1 and not first.masked
    require(first.dense and alone and is_data(label, [1]))
    name = trace.layer_name([first])
    if not label.sets():
        source = trace.builder.new_inputs(f"input of {name}", experts * rows)
        own = row_major([experts, rows], source)
        trace.set_label(x, Label(((own[0],), label.axes[1], (own[1],))))
    elif inner[0].set is not None and all(f.set is None for f in outer):
        # All experts read all neurons.
        source = trace.builder.new_merge("copy", experts * rows)
        of_outer, of_inner = row_major([experts, rows], source)
        starts = 0, label.start.get(inner[0].set, 0)
        large, small = [of_outer, of_inner], [Factor(experts), *inner]
        trace.builder.connect(large, small, starts, True, "copy")
    else:  # each expert reads its part of a set
        source = label.sets()[0]
        require(not label.start and [*outer, *inner] == row_major([experts, rows], source))
    trace.builder.mark_read(source)
    target = trace.builder.new_set(name, experts * columns)
    grid = (experts, rows, columns) if from_rows else (experts, columns, rows)
    trace.builder.add_kernel(
        Kernel(first.parameter, source, target, grid, (), first.start, from_rows=from_rows)
    )
    of_outer, of_inner = row_major([experts, columns], target)
    return Label(((of_outer,), label.axes[1], (of_inner,)))


@operation("_cdist_forward", "_euclidean_dist")
def distances(trace: Trace, out: Tensor, a: Tensor, b: Tensor, *_: Any) -> Label:
    """Follow pairwise distances of rows: symmetries are those of a product with the rows of b."""
    return product(trace, out, a, b.mT)


@operation("addmm", "baddbmm", "addbmm", "addmv", "_sparse_addmm")
def product_and_sum(trace: Trace, out: Tensor, c: Tensor, a: Tensor, b: Tensor, **_: Any):
    """Follow a matrix product and a sum, usually with a bias."""
    label = product(trace, out, a, b)
    if trace.weights(c):
        return trace.add_parameter(label, c)
    if trace.is_exchangeable(c):
        return label
    return trace.combine(label, trace.label(c), out.shape, "sum")


@operation("linear", "mkldnn_linear", "_addmm_activation")
def linear(trace: Trace, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None):
    """Follow a linear layer."""
    return trace.bias(trace.dense(x, -1, weight), -1, bias)


@operation("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(
    trace: Trace, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Label:
    """Follow a convolution, (N, C, *): a kernel of its channels."""
    transposed, groups = rest[3], rest[5]
    if not is_data(trace.label(x), range(2, x.dim())):
        trace.set_label(x, trace.as_places(trace.label(x), range(2, x.dim())))
    label = trace.dense(x, 1, weight, transposed, groups, "convolution")
    label = trace.bias(label, 1, bias)
    return Label((*label.axes[:2], *data(out.shape[2:]).axes), label.start)


@operation("embedding")
def embedding(trace: Trace, out: Tensor, table: Tensor, index: Tensor, *_: Any) -> Label:
    """Follow an embedding."""
    return trace.lookup(index, table)


@operation("_embedding_bag", "_embedding_bag_forward_only")
def bag(trace: Trace, out: Tensor, table: Tensor, index: Tensor, *_: Any) -> Label:
    """Follow an embedding bag, which reduces rows of a table."""
    label = trace.lookup(index, table)
    return Label((*data(out.shape[:1]).axes, label.axes[-1]))


@operation("_scaled_dot_product")
def attention(trace: Trace, out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any):
    """Follow softmax(Q K') V per head: products of queries and keys, summed, times values."""
    query, key, value = (trace.operand(t) for t in (q, k, v))
    key = Label((*key.axes[:-2], key.axes[-1], key.axes[-2]), key.start)
    return trace.contract(trace.contract(query, key), value)


@operation("_native_multi_head_attention")
def heads(
    trace: Trace, out: Tensor, q: Tensor, k: Tensor, v: Tensor, size: int, number: int,
    *weights: Any, **__: Any,
) -> Label:  # fmt: skip
    """Follow the fused operator of ``nn.MultiheadAttention`` in evaluation mode."""
    # The stubs of torch lack this method.
    is_own = all(q is t or q.is_same(t) for t in (k, v))  # pyright: ignore[reportAttributeAccessIssue]

    inputs = (q,) if is_own else (q, k, v)
    module = nn.MultiheadAttention(size, number, batch_first=True, device="meta")

    def attend(*tensors: Tensor) -> Tensor:
        read = tensors[:1] * 3 if is_own else tensors[:3]
        return _call(module, read, tensors[len(inputs) :], need_weights=False)[0]

    return replay(trace, attend, *inputs, *weights[:4])


@operation("_transformer_encoder_layer_fwd")
def encoder_layer(
    trace: Trace, out: Tensor, x: Tensor, size: int, number: int, w: Tensor, b: Tensor,
    w_out: Tensor, b_out: Tensor, gelu: bool, norm_first: bool, eps: float, *tensors: Any,
    **__: Any,
) -> Label:  # fmt: skip
    """Follow the fused operator of ``nn.TransformerEncoderLayer`` in evaluation mode."""
    norms, linears = tensors[:4], tensors[4:8]
    module = nn.TransformerEncoderLayer(
        size, number, len(linears[0]), 0.0, "gelu" if gelu else "relu", eps, True, norm_first,
        device="meta",
    )  # fmt: skip
    parameters = (w, b, w_out, b_out, *linears, *norms)
    return replay(trace, lambda x, *own: _call(module, (x,), own), x, *parameters)


def _call(module: nn.Module, inputs: tuple, parameters: Sequence[Tensor], **options: Any) -> Any:
    """Call a module with other parameters, in training mode, in which it is not fused."""
    names = (name for name, _ in module.named_parameters())
    return functional_call(module, dict(zip(names, parameters, strict=True)), inputs, options)
