"""Watching a user's own calls: nothing is left behind, and what comes later is seen."""

import copy
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.automorphisms import moved, random_symmetry
from support.optimizers import controller_file, copies, equal
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from l2o_graph import neural_graph
from l2o_graph.layout.spec import NetSpec
from l2o_graph.optim.optimizer import NGOptimizer
from l2o_graph.tracing import spec_of_computation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"))


def step(optimizer: NGOptimizer, net: nn.Module, *inputs, **named) -> None:
    optimizer.zero_grad()
    net(*inputs, **named).square().mean().backward()
    optimizer.step()


class Keeping(nn.Module):
    """Keeps whatever it can: in attributes, buffers, lists, counters and what it is given."""

    def __init__(self):
        super().__init__()
        self.inner, self.branch, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.register_buffer("mask", None, persistent=False)
        self.table: Tensor | None = None
        self.seen: list[Tensor] = []
        self.calls, self.own = 0, random.Random(0)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        self.calls += 1
        if self.table is None:
            self.table = torch.linspace(0, 1, len(x)).cos()[:, None]
            self.register_buffer("mask", torch.ones(len(x), 6), persistent=False)
        hidden = self.drop(self.norm(self.inner(x) + self.branch(x))) * self.mask
        self.seen.append(hidden)
        if cache is not None:
            cache["hidden"] = hidden
        noise = np.random.rand() + self.own.random()
        return self.head(hidden * self.table + torch.randn(6)) * noise


def drawn() -> tuple:
    """What the generators of NumPy and torch would draw next."""
    state = np.random.get_state(), torch.get_rng_state()
    answer = np.random.rand(), torch.rand(()).item()
    np.random.set_state(state[0])
    torch.set_rng_state(state[1])
    return answer


# In a process of its own: the type checks of these tests draw from Python's generator.
OF_PYTHON = """
import random, torch
from torch import nn
from l2o_graph import NGOptimizer, neural_graph

class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) * random.random()

net, x = Noisy(3, 2), torch.randn(4, 3)
before = random.getstate()
neural_graph(net, x)
assert random.getstate() == before
optimizer = NGOptimizer(net.parameters(), model=net)
net(x)
after = random.getstate()
random.setstate(before)
random.random()
assert optimizer._structure.traced is not None and random.getstate() == after
"""


def test_the_generator_of_python_stays_where_it_was():
    subprocess.run([sys.executable, "-c", OF_PYTHON], check=True)


def test_a_graph_of_a_batch_leaves_no_trace():
    net, x, cache = Keeping(), torch.randn(5, 4), {}
    before, generators = pickle.dumps(net.state_dict()), drawn()
    spec = neural_graph(net, (x, cache)).spec
    assert drawn() == generators
    assert pickle.dumps(net.state_dict()) == before
    assert net.table is net.mask is None and net.seen == [] and net.calls == 0 and cache == {}
    assert net.own.random() == random.Random(0).random()
    assert not net._forward_hooks and not net._forward_pre_hooks
    assert [n.name for n in spec.neurons if n.role == "hidden"][:2] == ["inner", "branch"]


def test_a_module_that_keeps_tensors_with_a_history_can_be_read():
    net, x = Keeping(), torch.randn(5, 4)
    net(x)  # what it keeps cannot be copied by copy.deepcopy
    kept = list(net.seen)
    assert neural_graph(net, x).spec.shapes == tuple(tuple(p.shape) for p in net.parameters())
    assert len(net.seen) == 1 and net.seen[0] is kept[0] and net.calls == 1


def test_a_watched_call_is_the_call_of_an_unwatched_model(checkpoint):
    """To the bit, and in what it keeps, with the generators where they would be."""
    found = []
    for watched in (True, False):
        torch.manual_seed(0)
        np.random.seed(0)
        net, x, cache = Keeping(), torch.randn(5, 4), {}
        optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
        if not watched:
            optimizer._structure.watching.leave()
        out = net(x, cache=cache)
        assert (optimizer._structure.traced is not None) == watched
        out.square().mean().backward()
        gradients = [p.grad for p in net.parameters()]
        found.append([out, *net.seen, net.table, net.mask, *net.buffers(), *gradients])
        assert net.calls == 1 and cache["hidden"] is net.seen[0]
        found[-1].append(torch.tensor(drawn()))
        assert all(type(t) is Tensor for t in found[-1])
    assert equal(*found)


def test_no_hook_stays_behind_the_optimizer():
    net = nn.Linear(3, 2)
    optimizer = NGOptimizer(net.parameters(), model=net)
    assert len(net._forward_hooks) == 1
    del optimizer
    assert not net._forward_hooks and not net._forward_pre_hooks
    assert "__prepare_scriptable__" not in net.__dict__


def test_an_interrupted_call_leaves_no_mode_behind_the_next_step(checkpoint):
    class Interrupted(nn.Linear):
        def forward(self, x):
            if not x.any():
                raise KeyboardInterrupt
            return super().forward(x)

    net = nn.Sequential(Interrupted(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    with pytest.raises(KeyboardInterrupt):
        net(torch.zeros(2, 4))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not is_in_torch_dispatch_mode()
    step(optimizer, net, torch.randn(2, 4))
    assert optimizer._structure.traced == spec_of_computation(net, (torch.randn(2, 4),))


def test_a_watched_model_can_be_scripted(checkpoint):
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(3, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    assert torch.equal(torch.jit.script(net)(x), net(x))
    for _ in range(2):
        step(optimizer, net, x)
    assert optimizer._structure.traced == spec_of_computation(net, (x,))


def test_a_model_of_two_optimizers_and_its_copies_can_be_scripted(checkpoint):
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 4)
    optimizers = [NGOptimizer(p.parameters(), checkpoint=checkpoint, model=net) for p in net[::2]]
    expected = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net):
        assert torch.equal(torch.jit.script(other)(x), expected)
        assert not other._forward_pre_hooks and "__prepare_scriptable__" not in other.__dict__
    assert all(one._structure.model is net for one in optimizers)


def test_an_optimizer_in_the_place_of_another_leaves_a_model_that_can_be_scripted(checkpoint):
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    assert len(net._forward_pre_hooks) == 1 and optimizer._structure.watching is not None
    assert torch.equal(torch.jit.script(net)(x), net(x))


@pytest.mark.parametrize("first", [0, 1])
def test_a_compiled_call_comes_back_once_no_optimizer_watches(first, checkpoint):
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 4)
    net.compile(backend="eager")
    compiled = net._compiled_call_impl
    optimizers = [NGOptimizer(p.parameters(), checkpoint=checkpoint, model=net) for p in net[::2]]
    for _ in range(3):
        net(x).sum().backward()
        for one in optimizers:
            one.step()
    assert all(one._structure.is_complete for one in optimizers)
    del one, optimizers[first]
    assert net._compiled_call_impl is not compiled  # examples are counted
    del optimizers[0]
    assert net._compiled_call_impl is compiled


def gap(net: nn.Module, spec: NetSpec, *inputs) -> float:
    """How much a random symmetry of the graph changes what the network says."""
    before = copies(net.parameters())
    after = moved(spec, before, random_symmetry(spec, 0))
    assert not equal(before, after)
    names = [name for name, _ in net.named_parameters()]
    said = [
        functional_call(net, dict(zip(names, each, strict=True)), inputs)
        for each in (before, after)
    ]
    return (said[0] - said[1]).abs().max().item()


# What comes later ------------------------------------------------------------------------------


class Heads(nn.Module):
    """A trunk, and heads of which each call uses one."""

    def __init__(self):
        super().__init__()
        self.trunk, self.wide = nn.Linear(4, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

    def forward(self, x: Tensor, head: int) -> Tensor:
        hidden = self.trunk(x).tanh()
        return self.heads[head](hidden + self.wide(hidden))


def test_heads_join_when_they_are_used_and_what_is_remembered_stays(checkpoint):
    net, x = Heads(), torch.randn(5, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    for head in (0, 0, 1, 2, 1):
        step(optimizer, net, x, head)
    assert optimizer._structure.spec.loose == () and not net._forward_hooks
    assert all(gap(net, optimizer._structure.spec, x, head) < 1e-5 for head in range(3))
    ages = [int(optimizer.state[p]["step"]) for p in net.parameters()]
    assert ages == [5, 5, 5, 5, 2, 2, 2, 2, 1, 1]


class Skipping(nn.Module):
    """Leaves layers of a residual stream out, as it is told."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, used: tuple[int, ...]) -> Tensor:
        x = self.first(x)
        for i in used:
            x = x + self.layers[i](x).tanh()
        return self.head(x)


def test_layers_that_were_left_out_join_the_stream(checkpoint):
    net, x = Skipping(), torch.randn(5, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    for used in ((0, 2), (1, 2), (0, 1, 2)):
        step(optimizer, net, x, used)
    assert optimizer._structure.spec.loose == ()
    for used in ((), (0, 1, 2), (1,), (0, 2)):
        assert gap(net, optimizer._structure.spec, x, used) < 1e-5


def test_a_batch_of_validation_first_changes_nothing(checkpoint):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head, self.other = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            hidden = self.inner(x).tanh()
            return self.head(hidden) + (self.other(hidden) if self.training else 0)

    ends = []
    for mode in (None, torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        net, x = Auxiliary(), torch.randn(5, 4)
        optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
        if mode is not None:
            with mode():
                net.eval()(x)
            net.train()
        for _ in range(3):
            step(optimizer, net, x)
        ends.append(copies(net.parameters()))
    assert equal(ends[0], ends[1]) and equal(ends[0], ends[2])


def test_a_head_that_comes_after_many_calls_joins_once_it_has_a_gradient(checkpoint):
    net, x = Heads(), torch.randn(5, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    for head in (0,) * 12 + (1, 1, 2, 2):
        step(optimizer, net, x, head)
    assert optimizer._structure.spec.loose == () and not net._forward_hooks


@pytest.mark.parametrize("given", [False, True])
def test_what_takes_the_place_of_a_layer_is_read_at_its_first_call(given, checkpoint):
    net, x = Heads(), torch.randn(5, 4)
    model = net if given else None
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=model)
    step(optimizer, net, x, 0)
    old = net.wide
    net.wide = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
    optimizer.add_param_group({"params": net.wide.parameters()})
    before = copies([*old.parameters(), *net.wide.parameters()])
    net(x, 0).square().mean().backward()
    optimizer.step()
    after = [*old.parameters(), *net.wide.parameters()]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True] + [
        False
    ] * 4
    assert gap(net, optimizer._structure.spec, x, 0) < 1e-5


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_module_compiled_in_place_is_read(when, checkpoint):
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net, x = Skipping(), torch.randn(5, 4)
        if compiled and when == "before":
            net.compile(backend="eager")
        optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
        if when == "after":
            step(optimizer, net, x, (0, 1, 2))
            if compiled:
                net.compile(backend="eager")
        for _ in range(2):
            step(optimizer, net, x, (0, 1, 2))
        assert (net._compiled_call_impl is not None) == compiled
        ends.append(copies(net.parameters()))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


def test_a_fast_path_is_read_as_the_slow_one():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True)
    net, x = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2)), torch.randn(2, 5, 3)
    expected = neural_graph(net, x).spec
    with torch.inference_mode():
        assert neural_graph(net.eval(), x).spec == expected
    net.requires_grad_(False)
    assert neural_graph(net, x).spec == expected


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_pads_in_evaluation_is_read_in_training(checkpoint):
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 8)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = neural_graph(net, (x, None, padded)).spec
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    with torch.no_grad():  # by way of nested tensors
        found = net.eval()(x, None, padded)
    step(optimizer, net.train(), x, None, padded)
    assert optimizer._structure.traced == expected
    net.requires_grad_(False).eval()
    assert neural_graph(net, (x, None, padded)).spec == expected
    assert found.shape == (2, 5, 8) and torch.backends.mha.get_fastpath_enabled()


def test_rows_of_several_lengths_in_one_tensor(checkpoint):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2))
    expected = neural_graph(net, torch.randn(3, 5, 4)).spec
    rows = torch.nested.nested_tensor([torch.randn(n, 4) for n in (3, 1, 4)], layout=torch.jagged)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    optimizer.zero_grad()
    net(rows).values().square().mean().backward()
    optimizer.step()
    assert optimizer._structure.traced == expected


def test_copies_of_a_watched_compiled_module_are_plain(checkpoint):
    net, x = Heads(), torch.randn(5, 4)
    net.compile(backend="eager")
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x, 0), net(x, 0))
    assert optimizer._structure.traced is not None
