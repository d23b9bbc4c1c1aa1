"""Rules of recurrent layers: a kernel for each gate, into one set that also reads itself.

A hidden neuron of an LSTM has four gates and a cell. A permutation of hidden neurons permutes the
rows of all gates and the columns that read the neurons.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from l2o_graph.layout.spec import Bias, Kernel
from l2o_graph.tracing.builder import row_major
from l2o_graph.tracing.labels import Factor, Label, data, require
from l2o_graph.tracing.network import register_layer
from l2o_graph.tracing.trace import Trace


def add_gates(
    trace: Trace, x: Tensor | int, target: int, weight: Tensor, bias: Tensor | None, name: str
) -> None:
    """Add the kernels of all gates, [gates * hidden, in], and their biases, [gates * hidden].

    ``x`` is an input (*, in), or the index of a set.
    """
    size = trace.builder.sets[target].size
    if isinstance(x, Tensor):
        read = trace.builder.read_axis(trace.label(x), x.dim() - 1, name)
        label, source, source_start, columns, inside = read
        require(not inside)
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


def set_initial_state(
    trace: Trace, target: int, states: Tensor | None, number: int | None = None
) -> None:
    """Connect initial states, (*, hidden), to a set as a bias, as other neurons, or as places.

    ``number`` selects a layer of states (layers, *, hidden). None stands for zeros.
    """
    if states is None:
        return
    state = states if number is None else states[number]
    label, size = trace.label(state), trace.builder.sets[target].size
    for weight in trace.weights(states)[:1]:  # a parameter, broadcast to all examples
        *outer, last = weight.axes
        at = weight.start + (0 if number is None else number * weight.strides[0])
        if number is not None:
            del outer[0]
        if last == (size, 1) and all(n == 1 or stride == 0 for n, stride in outer):
            trace.builder.add_bias(Bias(weight.parameter, target, size, at))
            return
    if label.sets():
        first = label.start.get(label.sets()[0], 0)
        factors = [f for axis in label.axes for f in axis if f.set is not None]
        is_same_range = [Factor(size, label.sets()[0], 1)] == list(label.axes[-1]) == factors
        if label.sets() == [target] and not first:
            return
        own = row_major([size], target)
        if is_same_range:
            trace.builder.connect(own, label.axes[-1], (0, first), True, "state")
            return
        trace.builder.fix_order(label.sets())
    elif trace.is_exchangeable(states):
        return
    trace.builder.add_places(target)


def label_states(trace: Trace, states: Tensor, s: int) -> None:
    """Label the last axis of states with the neurons of a set."""
    axes = (*data(states.shape[:-1]).axes, (Factor(states.shape[-1], s, 1),))
    trace.set_label(states, Label(axes))


@register_layer(nn.RNNBase)
def recurrent(trace: Trace, module: Any, inputs: tuple, output: Any) -> None:
    """Follow ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, also multi-layer and bidirectional."""
    x, sequence = (t.data if isinstance(t, PackedSequence) else t for t in (inputs[0], output[0]))
    initial, final = _states(inputs[1:]), _states(output[1:])
    directions = 2 if module.bidirectional else 1
    projected = module.proj_size
    visible = hidden = 0  # sets of the last layer
    for layer in range(module.num_layers):
        written = []
        for direction in range(directions):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            own = {key.removesuffix(suffix): p for key, p in module.named_parameters()}
            name = f"{trace.layer_name(trace.weights(own['weight_ih'])) or 'recurrent'}{suffix}"
            hidden = trace.builder.new_set(name, module.hidden_size)
            add_gates(trace, x, hidden, own["weight_ih"], own.get("bias_ih"), name)
            visible = hidden
            if projected:
                visible = trace.builder.new_set(f"{name} projected", projected)
                (w, *_) = trace.weights(own["weight_hr"])
                grid = (1, projected, module.hidden_size)
                trace.builder.add_kernel(Kernel(w.parameter, hidden, visible, grid, (), w.start))
            add_gates(trace, visible, hidden, own["weight_hh"], own.get("bias_hh"), name)
            number = layer * directions + direction
            # States of LSTMs are (hidden, cell), of others (hidden,).
            for each, s in zip(initial, (visible, hidden), strict=False):
                set_initial_state(trace, s, each, number)
            for each, s in zip(final, (visible, hidden), strict=False):
                label_states(trace, each[number], s)
            trace.builder.sets[visible].fresh = True
            written.append(visible)
        width = projected or module.hidden_size
        pieces = []
        for s in written:
            pieces.append(torch.empty((*sequence.shape[:-1], width), device="meta"))
            label_states(trace, pieces[-1], s)
        x = pieces[0]
        if directions == 2:
            x = torch.empty((*sequence.shape[:-1], 2 * width), device="meta")
            trace.set_label(x, trace.cat(pieces, -1, x))
    trace.set_label(sequence, trace.label(x))
    if module.num_layers * directions == 1:
        for each, s in zip(final, (visible, hidden), strict=False):
            label_states(trace, each, s)


@register_layer(nn.RNNCellBase)
def cell(trace: Trace, module: Any, inputs: tuple, output: Any) -> None:
    """Follow a step of ``nn.RNNCell``, ``nn.LSTMCell`` or ``nn.GRUCell``.

    Steps after the first only add kernels from new inputs.
    """
    known = trace.cell_sets.get(module)
    if known is None:
        name = trace.layer_name(trace.weights(module.weight_ih)) or "cell"
        known = trace.builder.new_set(name, module.hidden_size)
        add_gates(trace, inputs[0], known, module.weight_ih, module.bias_ih, name)
        add_gates(trace, known, known, module.weight_hh, module.bias_hh, name)
        trace.cell_sets[module] = known
    elif trace.label(inputs[0]).sets():  # possibly others than in the first step
        add_gates(trace, inputs[0], known, module.weight_ih, None, "")
    for state in _states(inputs[1:]):
        set_initial_state(trace, known, state)
    trace.builder.sets[known].fresh = True
    for state in _states((output,)):
        label_states(trace, state, known)


def _states(arguments: tuple) -> tuple:
    """Return the states in an optional argument: (hidden, cell), (hidden,), or ()."""
    states = arguments[0] if arguments else ()
    return states if isinstance(states, tuple) else (states,)
