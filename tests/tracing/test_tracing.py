"""Graphs of networks: every parameter has a place, and symmetries are the network's own."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.automorphisms import Coloured, moved, random_symmetry
from support.networks import NETWORKS, Case
from support.optimizers import drop_rounding, tame_controller
from torch import Tensor, nn
from torch.func import functional_call

from l2o_graph.layout.spec import ACTIVATIONS, NetSpec
from l2o_graph.optim.optimizer import NGOptimizer
from l2o_graph.tracing import spec_of_computation


def prepared(case: Case, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network in float64, without zeros and ones as parameters, and its batch."""
    torch.manual_seed(seed)
    net, (x, y) = case.make().double(), case.batch()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
    return net, x, y


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def output(net: nn.Module, parameters: list[Tensor], x: Tensor) -> Tensor:
    names = [name for name, _ in net.named_parameters()]
    return functional_call(net, dict(zip(names, parameters, strict=True)), (x,))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_its_place(name):
    net, x, _ = prepared(NETWORKS[name])
    spec = spec_of_computation(net, (x,))
    assert [spec.names[i] for i in spec.loose] == []
    assert spec.shapes == tuple(tuple(p.shape) for p in net.parameters())
    held = [torch.zeros(p.numel(), dtype=torch.int) for p in net.parameters()]
    for k in (*spec.kernels, *spec.biases):
        if not spec.is_constant(k.parameter) and not k.again:
            held[k.parameter][k.start : k.start + k.size] += 1
    assert all((h == 1).all() for h in held), "each scalar once"


@pytest.mark.parametrize("name", ["resnet", "lstm", "gpt"])
def test_parameters_in_one_storage_are_told_apart(name):
    net, x, _ = prepared(NETWORKS[name])
    expected = spec_of_computation(net, (x,))
    nn.utils.vector_to_parameters(torch.cat([p.flatten() for p in values(net)]), net.parameters())
    assert len({p.untyped_storage().data_ptr() for p in net.parameters()}) == 1
    assert spec_of_computation(net, (x,)) == expected


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
def test_an_activation_is_told(name):
    """In place or not, behind a norm and a residual addition."""
    function = getattr(torch if name == "sin" else F, name)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            x = function(self.norm(self.a(x)))
            return self.c(function(self.b(x) + x))

    spec = spec_of_computation(Net(), (torch.randn(5, 3),))
    told = {n.name: n.activation for n in spec.neurons}
    assert told == {"input of a": "", "a": "", "norm": name, "b": name, "c": ""}
    assert f"norm [4] {name} -> b [4] {name}" in str(spec)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_symmetry_of_the_graph_is_one_of_the_network(name, seed):
    """No edge is missing: every permutation that the graph allows leaves the function unchanged."""
    net, x, _ = prepared(NETWORKS[name])
    spec = spec_of_computation(net, (x,))
    symmetry = random_symmetry(spec, seed)
    before = values(net)
    after = moved(spec, before, symmetry)
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > 1
    expected = output(net, before, x)
    torch.testing.assert_close(output(net, after, x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_neurons_that_can_be_exchanged_are_known_to_be(name):
    """No edge is redundant: channels, residual streams, heads and their entries, gates."""
    case = NETWORKS[name]
    net, x, _ = prepared(case)
    spec = spec_of_computation(net, (x,))
    coloured = Coloured(spec)
    coloured.refine()
    ends = np.cumsum([neurons.size for neurons in spec.neurons])
    for part, expected in case.orbits.items():
        (n,) = [
            n for n, one in enumerate(spec.neurons) if one.name == part and one.role == "hidden"
        ]
        own = coloured.colours[ends[n] - spec.neurons[n].size : ends[n]]
        assert len(np.unique(own)) == expected, part


def trained(net: nn.Module, case: Case, x: Tensor, y: Tensor, steps: int = 5):
    """Return the losses of some steps, and the parameters after them."""
    optimizer = NGOptimizer(net.parameters(), checkpoint=tame_controller(), model=net)
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = case.loss(net(x), y)
        loss.backward()
        losses.append(loss.item())
        if len(losses) <= steps:
            drop_rounding(net.parameters())
            optimizer.step()
    return losses, values(net)


def put(net: nn.Module, parameters: list[Tensor]) -> nn.Module:
    with torch.no_grad():
        for p, value in zip(net.parameters(), parameters, strict=True):
            p.copy_(value)
    return net


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_five_steps_commute_with_a_symmetry(name):
    case = NETWORKS[name]
    net, x, y = prepared(case)
    spec = spec_of_computation(net, (x,))
    start = values(net)
    symmetry = random_symmetry(spec, 3)
    _, end = trained(net, case, x, y)
    there, _, _ = prepared(case)
    _, end_there = trained(put(there, moved(spec, start, symmetry)), case, x, y)
    assert apart(end_there, moved(spec, end, symmetry)) < 1e-6


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", NETWORKS)
def test_five_steps_lower_the_loss(name):
    case = NETWORKS[name]
    torch.manual_seed(0)
    net, (x, y) = case.make(), case.batch()
    losses, _ = trained(net, case, x, y)
    assert losses[-1] < losses[0]


class Twice(nn.Module):
    """Network with a layer, a norm and a weight that are each used under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.linear, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.again, self.norm_again, self.last = self.linear, self.norm, nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x):
        x = self.norm(self.linear(self.first(x))).relu()
        return self.last(self.norm_again(self.again(x)))


def test_a_network_with_a_layer_under_two_names_stays_as_it_is():
    module, x = Twice(), torch.randn(5, 4)
    before = {key: t.clone() for key, t in module.state_dict().items()}
    held = {key: id(p) for key, p in module.named_parameters(remove_duplicate=False)}
    spec = spec_of_computation(module, (x,))
    assert {key: id(p) for key, p in module.named_parameters(remove_duplicate=False)} == held
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)
    assert not spec.loose
    of_linear = [k for k in spec.kernels if k.parameter == spec.names.index("linear.weight")]
    assert [k.again for k in of_linear] == [False, True]


@pytest.mark.parametrize("name", ["resnet", "gated", "unet"])
def test_channels_last_kernels_are_kernels(name):
    net, x, _ = prepared(NETWORKS[name])
    expected = spec_of_computation(net, (x,))
    last = net.to(memory_format=torch.channels_last)
    assert any(not p.is_contiguous() for p in last.parameters())
    assert spec_of_computation(last, (x.to(memory_format=torch.channels_last),)) == expected


class States(nn.Module):
    """Recurrent layers whose initial state is another layer's output or a parameter."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.head = kind, nn.Linear(4, 2)
        self.encoder, self.decoder = (nn.LSTM(3, 4, 2, batch_first=True) for _ in range(2))
        self.start, self.cell = nn.Linear(3, 4), nn.GRUCell(3, 4)
        self.both = nn.GRU(3, 2, bidirectional=True, batch_first=True)
        self.begin = nn.Parameter(torch.randn(1, 1, 4))
        self.plain = nn.RNN(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "all states to a decoder":
            return self.head(self.decoder(x, self.encoder(x)[1])[0])
        if self.kind == "a lower layer's state":
            return self.head(self.encoder(x)[1][0][0])
        if self.kind == "a cell's state":
            return self.head(self.encoder(x)[1][1][-1])
        if self.kind == "a layer before a cell":
            return self.head(self.cell(x[:, 1], self.start(x[:, 0])))
        if self.kind == "both directions":
            last = self.both(x)[1]
            return self.head(torch.cat([last[0], last[1]], -1))
        if self.kind == "fixed numbers":
            first = torch.arange(4.0, dtype=x.dtype).expand(1, len(x), 4)
            return self.head(self.plain(x, first)[1][0])
        return self.head(self.plain(x, self.begin.expand(1, len(x), 4).contiguous())[1][0])


def moved_without_effect(
    net: nn.Module, x: Tensor, spec: NetSpec
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return parameters before and after a symmetry of the graph, which keeps the output."""
    before = values(net)
    after = moved(spec, before, random_symmetry(spec, 0))
    torch.testing.assert_close(output(net, after, x), output(net, before, x), rtol=0, atol=1e-9)
    return before, after


@pytest.mark.parametrize(
    "kind",
    [
        "all states to a decoder", "a lower layer's state", "a cell's state",
        "a layer before a cell", "both directions", "fixed numbers", "a parameter",
    ],
)  # fmt: skip
def test_states_of_recurrent_layers(kind):
    torch.manual_seed(0)
    net, x = States(kind).double(), torch.randn(5, 6, 3).double()
    spec = spec_of_computation(net, (x,))
    moved_without_effect(net, x, spec)
    (head,) = [k for k in spec.kernels if k.parameter == spec.names.index("head.weight")]
    assert spec.neurons[head.source].role != "input"


class ByHand(nn.Module):
    """Hand-written recurrent networks with zero initial states, concatenated with inputs."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.head = kind, nn.Linear(4, 2)
        self.beside, self.cell = nn.Linear(7, 4), nn.GRUCell(4, 4)
        self.maps = nn.Conv1d(7, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        if self.kind == "maps":
            state = x.new_zeros(len(x), 4, 5)
        for t in range(x.shape[1]):
            if self.kind == "maps":
                pixels = x[:, t, :, None].expand(-1, -1, 5)
                state = self.maps(torch.cat([pixels, state], 1)).tanh()
            else:
                state = self.beside(torch.cat([state, x[:, t]], 1)).tanh()
            if self.kind == "cells":
                state = self.cell(state.sin(), state)
        return self.head(state.mean(2) if self.kind == "maps" else state)


@pytest.mark.parametrize("kind", ["states", "maps", "cells"])
def test_recurrence_by_hand(kind):
    torch.manual_seed(0)
    net, x = ByHand(kind).double(), torch.randn(5, 3, 3).double()
    spec = spec_of_computation(net, (x,))
    before, after = moved_without_effect(net, x, spec)
    assert not torch.equal(before[0], after[0])  # the columns of the head


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
def test_channels_of_a_flattened_map_keep_their_order_before_a_recurrent_layer(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps, self.head = nn.Conv1d(2, 4, 3), nn.Linear(5, 2)
            self.recurrent = kind(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            states = self.recurrent(self.maps(x).tanh().flatten(1))
            return self.head(states[0] if isinstance(states, tuple) else states)

    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(6, 2, 5).double()
    with pytest.warns(UserWarning, match="the use of 'recurrent.weight_ih"):
        spec = spec_of_computation(net, (x,))
    before = values(net)
    after = moved(spec, before, random_symmetry(spec, 0))
    torch.testing.assert_close(output(net, after, x), output(net, before, x), rtol=0, atol=1e-9)


def test_a_table_of_which_some_rows_are_used_has_its_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 9, 4))
            self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x) + self.table[:, 1 : x.shape[1] + 1])

    spec = spec_of_computation(Net(), (torch.rand(2, 5, 3),))
    (kernel,) = [k for k in spec.kernels if k.parameter == 0]
    assert 0 not in spec.loose
    assert kernel.grid == (1, 9, 4)
    assert spec.neurons[kernel.source].size == 9


def test_an_expert_without_tokens_leaves_the_others_as_they_are():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.inner(x)
            out = torch.zeros_like(tokens)
            for expert, chosen in zip(self.experts, (x[:, 0] < 9, x[:, 0] > 9), strict=True):
                out[chosen] += expert(tokens[chosen])
            return self.head(tokens + out)

    net, x = Experts().double(), torch.rand(5, 3).double()
    spec = spec_of_computation(net, (x,))
    assert [spec.names[i] for i in spec.loose] == ["experts.1.weight", "experts.1.bias"]
    before, after = moved_without_effect(net, x, spec)
    assert not torch.equal(before[0], after[0])
