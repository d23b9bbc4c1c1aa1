"""Recurrent layers: gates are kernels side by side into one set of neurons, which reads itself.

A hidden neuron of an LSTM has four gates and a cell; permuting neurons permutes the rows of all
gates together and the columns that read them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from l2o_graph.architecture import Bias, Kernel
from l2o_graph.tracing.labels import Factor, Label, data
from l2o_graph.tracing.network import register_layer
from l2o_graph.tracing.trace import Trace


def gates(
    trace: Trace, x: Tensor | int, target: int, weight: Tensor, bias: Tensor | None, name: str
) -> None:
    """Kernels of all gates, [gates * hidden, in], from a tensor's last axis or from a set."""
    size = trace.builder.sets[target].size
    if isinstance(x, Tensor):
        known = trace.builder.read(trace.label(x), x.dim() - 1, name)
        if known is None or known[4]:
            return
        label, source, source_start, columns, _ = known
        trace.set_label(x, label)
    else:
        source, source_start, columns = x, 0, trace.builder.sets[x].size
    for w in trace.weights(weight)[:1]:
        for gate in range(w.shape[0] // size):
            trace.builder.join(
                Kernel(
                    w.parameter, source, target, (1, size, columns), (),
                    w.start + gate * size * columns, source_start, kind=f"gate {gate}",
                )
            )  # fmt: skip
    for b in trace.weights(bias)[:1]:
        for gate in range(b.shape[0] // size):
            trace.builder.sit(Bias(b.parameter, target, size, b.start + gate * size))


@register_layer(nn.RNNBase)
def recurrent(trace: Trace, module: Any, inputs: tuple, output: Any) -> None:
    """``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, of several layers, in one direction or both."""
    x = inputs[0].data if isinstance(inputs[0], PackedSequence) else inputs[0]
    sequence, last = output
    sequence = sequence.data if isinstance(sequence, PackedSequence) else sequence
    directions = 2 if module.bidirectional else 1
    projected = module.proj_size
    for layer in range(module.num_layers):
        written = []
        for direction in range(directions):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            own = {key.removesuffix(suffix): p for key, p in module.named_parameters()}
            name = f"{trace.name(trace.weights(own['weight_ih'])) or 'recurrent'}{suffix}"
            hidden = trace.builder.new_set(name, module.hidden_size)
            gates(trace, x, hidden, own["weight_ih"], own.get("bias_ih"), name)
            shown = hidden
            if projected:
                shown = trace.builder.new_set(f"{name} projected", projected)
                (w, *_) = trace.weights(own["weight_hr"])
                grid = (1, projected, module.hidden_size)
                trace.builder.join(Kernel(w.parameter, hidden, shown, grid, (), w.start))
            gates(trace, shown, hidden, own["weight_hh"], own.get("bias_hh"), name)
            trace.builder.sets[shown].fresh = True
            written.append(shown)
        width = projected or module.hidden_size
        pieces = []
        for s in written:
            piece = torch.empty((*sequence.shape[:-1], width), device="meta")
            trace.set_label(piece, Label((*data(piece.shape[:-1]).axes, (Factor(width, s, 1),))))
            pieces.append(piece)
        x = pieces[0]
        if directions == 2:
            x = torch.empty((*sequence.shape[:-1], 2 * width), device="meta")
            trace.set_label(x, trace.cat(pieces, -1, x))
    trace.set_label(sequence, trace.label(x))
    # Of the last states, those of the last layer are what networks go on with.
    state = last[0] if isinstance(last, tuple) else last
    if directions == 1:
        axes = (*data(state.shape[:-1]).axes, trace.label(x).axes[-1])
        trace.set_label(state, Label(axes))


@register_layer(nn.RNNCellBase)
def cell(trace: Trace, module: Any, inputs: tuple, output: Any) -> None:
    """One step of ``nn.RNNCell``, ``nn.LSTMCell`` or ``nn.GRUCell``; later steps add nothing."""
    known = trace.known_sets.get(module)
    if known is None:
        name = trace.name(trace.weights(module.weight_ih)) or "cell"
        known = trace.builder.new_set(name, module.hidden_size)
        trace.known_sets[module] = known
        gates(trace, inputs[0], known, module.weight_ih, module.bias_ih, name)
        gates(trace, known, known, module.weight_hh, module.bias_hh, name)
        trace.builder.sets[known].fresh = True
    for state in output if isinstance(output, tuple) else (output,):
        axes = (*data(state.shape[:-1]).axes, (Factor(module.hidden_size, known, 1),))
        trace.set_label(state, Label(axes))
