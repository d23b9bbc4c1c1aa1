"""Recurrent layers: gates are kernels side by side into one set of neurons, which reads itself.

A hidden neuron of an LSTM has four gates and a cell; permuting neurons permutes the rows of all
gates together and the columns that read them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from l2o_graph.layout.spec import Bias, Kernel
from l2o_graph.tracing.builder import numbered
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
            trace.builder.add_kernel(
                Kernel(
                    w.parameter, source, target, (1, size, columns), (),
                    w.start + gate * size * columns, source_start, kind=f"gate {gate}",
                )
            )  # fmt: skip
    for b in trace.weights(bias)[:1]:
        for gate in range(b.shape[0] // size):
            trace.builder.add_bias(Bias(b.parameter, target, size, b.start + gate * size))


def begins(trace: Trace, target: int, states: Tensor | None, number: int | None = None) -> None:
    """The neurons of a set begin as what the last axis of a tensor is, None being zeros.

    ``number`` is which entry of its first axis; None for all of it.
    """
    if states is None:
        return
    state = states if number is None else states[number]
    label, size = trace.label(state), trace.builder.sets[target].size
    for weight in trace.weights(states)[:1]:  # the same for all examples
        *outer, last = weight.steps
        at = weight.start + (0 if number is None else number * weight.strides[0])
        if number is not None:
            del outer[0]
        if last == (size, 1) and all(n == 1 or stride == 0 for n, stride in outer):
            trace.builder.add_bias(Bias(weight.parameter, target, size, at))
            return
    if label.sets():
        first = label.start.get(label.sets()[0], 0)
        factors = [f for axis in label.axes for f in axis if f.set is not None]
        alike = [Factor(size, label.sets()[0], 1)] == list(label.axes[-1]) == factors
        if label.sets() == [target] and not first:
            return
        own = numbered([size], target)
        if alike and trace.builder.connect(own, label.axes[-1], (0, first), True, "state"):
            return
        trace.builder.lose(label.sets())
    elif trace.is_even(states):
        return
    trace.builder.fix(target)


def shows(trace: Trace, states: Tensor, s: int) -> None:
    """Say that the last axis of a tensor is the neurons of a set."""
    axes = (*data(states.shape[:-1]).axes, (Factor(states.shape[-1], s, 1),))
    trace.set_label(states, Label(axes))


@register_layer(nn.RNNBase)
def recurrent(trace: Trace, module: Any, inputs: tuple, output: Any) -> None:
    """``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, of several layers, in one direction or both."""
    x = inputs[0].data if isinstance(inputs[0], PackedSequence) else inputs[0]
    sequence, last = output
    first = inputs[1] if len(inputs) > 1 else None
    of_first = first if isinstance(first, tuple) else (first,)
    of_last = last if isinstance(last, tuple) else (last,)
    sequence = sequence.data if isinstance(sequence, PackedSequence) else sequence
    directions = 2 if module.bidirectional else 1
    projected = module.proj_size
    shown = hidden = 0  # of the last layer, of which there is one at least
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
                trace.builder.add_kernel(Kernel(w.parameter, hidden, shown, grid, (), w.start))
            gates(trace, shown, hidden, own["weight_hh"], own.get("bias_hh"), name)
            number = layer * directions + direction
            # States of LSTMs are (shown, hidden), of others (hidden,).
            for each, s in zip(of_first, (shown, hidden), strict=False):
                begins(trace, s, each, number)
            for each, s in zip(of_last, (shown, hidden), strict=False):
                shows(trace, each[number], s)
            trace.builder.sets[shown].fresh = True
            written.append(shown)
        width = projected or module.hidden_size
        pieces = []
        for s in written:
            pieces.append(torch.empty((*sequence.shape[:-1], width), device="meta"))
            shows(trace, pieces[-1], s)
        x = pieces[0]
        if directions == 2:
            x = torch.empty((*sequence.shape[:-1], 2 * width), device="meta")
            trace.set_label(x, trace.cat(pieces, -1, x))
    trace.set_label(sequence, trace.label(x))
    if module.num_layers * directions == 1:
        for each, s in zip(of_last, (shown, hidden), strict=False):
            shows(trace, each, s)


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
    elif trace.label(inputs[0]).sets():  # others than at the first step, perhaps
        gates(trace, inputs[0], known, module.weight_ih, None, "")
    first = inputs[1] if len(inputs) > 1 else None
    for state in first if isinstance(first, tuple) else (first,):
        begins(trace, known, state)
    trace.builder.sets[known].fresh = True
    for state in output if isinstance(output, tuple) else (output,):
        shows(trace, state, known)
