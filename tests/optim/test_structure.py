"""How an optimizer comes to know its model, and what it does where it cannot."""

import copy
import io
import pickle

import pytest
import torch
from support.automorphisms import moved, random_symmetry
from support.networks import GPT, NETWORKS, text
from support.optimizers import controller_file, copies, equal
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import l2o_graph.tracing.network as network
from l2o_graph import neural_graph, register_layer
from l2o_graph.layout.spec import NetSpec
from l2o_graph.optim.optimizer import NGOptimizer
from l2o_graph.tracing import spec_of_computation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"))


def step(optimizer: NGOptimizer, net: nn.Module, *inputs) -> None:
    optimizer.zero_grad()
    net(*inputs).square().mean().backward()
    optimizer.step()


class Skip(nn.Module):
    """What no order of parameters tells: a sum of two branches."""

    def __init__(self):
        super().__init__()
        self.last, self.a, self.b = nn.Linear(5, 2), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.a(x) + self.b(x)))


def test_the_first_call_of_the_model_tells_its_structure(checkpoint):
    torch.manual_seed(0)
    net, x = Skip(), torch.randn(3, 4)
    twin = copy.deepcopy(net)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    assert len(net._forward_hooks) == 1
    step(optimizer, net, x)
    assert not net._forward_hooks
    expected = NGOptimizer(twin.parameters(), checkpoint=checkpoint, model=twin)
    expected.read_structure((x,))
    step(expected, twin, x)
    assert equal(net.parameters(), twin.parameters())
    by_order = copy.deepcopy(Skip())
    by_order.load_state_dict(copy.deepcopy(net).state_dict())
    spec = spec_of_computation(net, (x,))
    assert [spec.neurons[k.target].name for k in spec.kernels[:2]] == ["a", "b"]
    assert str(neural_graph(net, x)) == f"NeuralGraph of {spec}"


def test_structure_is_read_once(checkpoint, monkeypatch):
    calls = []
    real = network.Watch
    monkeypatch.setattr(network, "Watch", lambda *of: calls.append(of) or real(*of))
    net, x = Skip(), torch.randn(3, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    for _ in range(3):
        step(optimizer, net, x)
    first = optimizer._structure.spec
    step(optimizer, net, x)
    assert len(calls) == 1 and optimizer._structure.spec is first


def test_one_hook_waits_for_the_first_batch_however_often_a_state_is_loaded(checkpoint):
    net, x = Skip(), torch.randn(3, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    for _ in range(3):
        optimizer.load_state_dict(optimizer.state_dict())
        assert len(net._forward_hooks) == 1
    step(optimizer, net, x)
    assert not net._forward_hooks
    optimizer.load_state_dict(optimizer.state_dict())
    assert not net._forward_hooks and optimizer._structure.traced is not None


@pytest.mark.parametrize("when", ["before the first call", "after it"])
def test_model_and_optimizer_can_be_copied_and_pickled(when, checkpoint):
    torch.manual_seed(0)
    net, x = Skip(), torch.randn(3, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    if when == "after it":
        step(optimizer, net, x)
    alone = pickle.loads(pickle.dumps(net))
    alone(x)  # whatever hook it holds does nothing
    torch.save(net, io.BytesIO())
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        there = other._structure.model
        step(other, there, x)
        mine, twin = copy.deepcopy(net), copies(there.parameters())
        again = NGOptimizer(mine.parameters(), checkpoint=checkpoint, model=mine)
        again.load_state_dict(optimizer.state_dict())
        step(again, mine, x)
        assert equal(mine.parameters(), twin)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_are_looked_into(wrap, checkpoint):
    torch.manual_seed(0)
    net, x = Skip(), torch.randn(3, 4)
    twin = copy.deepcopy(net)
    outer = wrap(net)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=outer)
    step(optimizer, outer, x)
    expected = NGOptimizer(twin.parameters(), checkpoint=checkpoint, model=twin)
    step(expected, twin, x)
    assert optimizer._structure.traced == expected._structure.traced
    assert equal(net.parameters(), twin.parameters())


def test_nothing_of_the_model_is_disturbed(checkpoint):
    """Neither its buffers nor the random numbers of the training that follows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 2))
    twin, x = copy.deepcopy(net), torch.randn(6, 4)
    NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    torch.manual_seed(1)
    found = net(x)
    torch.manual_seed(1)
    assert torch.equal(found, twin(x))
    assert equal(net.buffers(), twin.buffers())


class Asking(nn.Module):
    """Goes another way by the numbers on its way."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        return self.last(x.relu() if x.sum().item() > 0 else x.tanh())


def test_a_network_may_ask_for_numbers_on_its_way(checkpoint):
    net, x = Asking(), torch.randn(3, 4)
    expected = spec_of_computation(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), (x,))
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    step(optimizer, net, x)
    assert optimizer._structure.traced.kernels == expected.kernels
    assert net.calls == 1, "the user's own call alone"


class Failing(nn.Module):
    """Fails at its first calls, as a loop that catches what does not fit into memory sees it."""

    def __init__(self):
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.first(x)
        if self.calls < 3:
            raise MemoryError("not now")
        return self.last(hidden + self.branch(x))


def test_a_call_that_fails_fails_as_before_and_the_next_one_is_read(checkpoint):
    net, x = Failing(), torch.randn(3, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    for _ in range(2):
        with pytest.raises(MemoryError, match="not now"):
            net(x)
        assert not is_in_torch_dispatch_mode()
    assert optimizer._structure.traced is None
    step(optimizer, net, x)
    assert optimizer._structure.traced == spec_of_computation(net, (x,))


def test_a_batch_that_cannot_be_read_is_told_of_once(checkpoint):
    net, x = Failing(), torch.randn(3, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    with pytest.warns(UserWarning, match=r"could not follow the model \(MemoryError\('not now'\)"):
        optimizer.read_structure((x,))
    net.calls = 3
    step(optimizer, net, x)
    assert optimizer._structure.traced is not None


class Strange(nn.Module):
    """A layer of its own kind, that no operation gives away."""

    def __init__(self, source: int, target: int):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(target, source))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.pinv(self.matrix)


def test_an_unknown_module_is_named_and_can_be_made_known(checkpoint, monkeypatch):
    monkeypatch.setattr(network, "LAYERS", dict(network.LAYERS))
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), Strange(5, 3), nn.Linear(3, 2)), torch.randn(6, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    before = net[1].matrix.detach().clone()
    with pytest.warns(UserWarning, match=r"the use of '1\.matrix' could not be traced") as w:
        step(optimizer, net, x)
    step(optimizer, net, x)
    assert len(w) == 1
    assert not torch.equal(net[1].matrix, before), "updated from its own features"

    @register_layer(Strange)
    def strange(trace, module, inputs, output):
        trace.set_label(output, trace.dense(inputs[0], -1, module.matrix))

    spec = spec_of_computation(net, (x,))
    assert spec.loose == ()
    kernels = [(spec.names[k.parameter], k.grid) for k in spec.kernels]
    assert kernels == [("0.weight", (1, 5, 4)), ("1.matrix", (1, 3, 5)), ("2.weight", (1, 2, 3))]


class Factors(nn.Module):
    """A matrix of low rank, by its entries or times an input; some parameters meet no input."""

    def __init__(self):
        super().__init__()
        self.left = nn.Parameter(0.1 * torch.randn(20, 3))
        self.right = nn.Parameter(0.1 * torch.randn(15, 3))
        self.offset = nn.Parameter(torch.zeros(15))

    def forward(self, x: Tensor | None = None, scale: float = 1.0) -> Tensor:
        matrix = scale * self.left @ self.right.T + self.offset
        return matrix if x is None else x @ matrix


def test_parameters_of_a_model_without_inputs_are_tables(checkpoint, recwarn):
    torch.manual_seed(0)
    net = Factors()
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint)
    step(optimizer, net)
    kinds = [entry.kind for entry in optimizer.explain().entries]
    assert kinds == ["table", "table", "vector"]
    assert not recwarn.list
    spec = spec_of_computation(net, (), {"scale": 2.0})
    places = {spec.names[k.parameter]: (k.kind, k.grid) for k in spec.kernels}
    assert places["left"] == ("lookup", (1, 20, 3)) and places["right"] == ("lookup", (1, 15, 3))


@pytest.mark.parametrize("weights", [lambda p: p, lambda p: p.softmax(0)], ids=["raw", "softmax"])
def test_weights_of_layers_in_a_sum_are_nothing_unknown(weights, checkpoint, recwarn):
    class Mixed(Skip):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            a, b = weights(self.mix)
            return self.last(a * self.a(x) + b * self.b(x))

    net = Mixed()
    step(NGOptimizer(net.parameters(), model=net, checkpoint=checkpoint), net, torch.randn(3, 4))
    assert not recwarn.list


def test_a_product_of_parameters_that_meets_an_input_is_no_table():
    with pytest.warns(UserWarning, match="the use of 'left', 'right' could not be traced"):
        spec = spec_of_computation(Factors(), (torch.randn(4, 20),))
    assert {spec.names[i] for i in spec.loose} >= {"left", "right"}


def test_matrix_factorisation_fills_in_what_is_missing(checkpoint):
    torch.manual_seed(0)
    net, matrix = Factors(), torch.randn(20, 3) @ torch.randn(3, 15)
    known = torch.rand_like(matrix) < 0.6
    optimizer = NGOptimizer(net.parameters())
    for _ in range(300):
        optimizer.zero_grad()
        (net() - matrix)[known].square().mean().backward()
        optimizer.step()
    assert (net() - matrix)[~known].square().mean() < 0.01 * matrix.square().mean()


def test_a_changed_model_is_read_again(checkpoint):
    torch.manual_seed(0)
    net, x = Skip(), torch.randn(3, 4)
    optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
    step(optimizer, net, x)
    for layer, shape in ((net.a, (6, 4)), (net.b, (6, 4)), (net.last, (2, 6))):
        layer.weight.grad, layer.weight.data = None, torch.randn(shape)
    for layer in (net.a, net.b):
        layer.bias.grad, layer.bias.data = None, torch.randn(6)
    step(optimizer, net, x)
    assert optimizer._structure.spec.shapes == tuple(tuple(p.shape) for p in net.parameters())
    step(optimizer, net, x)
    assert [n.size for n in optimizer._structure.spec.neurons if n.role == "hidden"] == [6, 6]


# Negative controls: what is no symmetry must move the updates. ----------------------------------


def test_a_model_that_lists_only_some_of_its_parameters_is_read_as_a_whole(checkpoint):
    class Listing(Skip):
        def parameters(self, recurse: bool = True):
            yield from (p for p in super().parameters(recurse) if p.requires_grad)

    whole, part = Skip(), Listing()
    part.load_state_dict(whole.state_dict())
    x = torch.randn(3, 4)
    for net in (whole, part):
        net.last.requires_grad_(False)
        step(NGOptimizer([*net.parameters()], model=net, checkpoint=checkpoint), net, x)
    assert equal(whole.state_dict().values(), part.state_dict().values())
    assert neural_graph(part, x).spec == neural_graph(whole, x).spec


def exchanged(spec: NetSpec, tensors: list[Tensor], name: str, order: list[int]) -> list[Tensor]:
    """Tensors with the neurons of one set in another order, and whatever touches them, but
    nothing else."""
    (n,) = [i for i, one in enumerate(spec.neurons) if one.name == name]
    symmetry = torch.arange(spec.num_nodes).numpy()
    start = sum(one.size for one in spec.neurons[:n])
    symmetry[start : start + len(order)] = [start + i for i in order]
    return moved(spec, tensors, symmetry)


@pytest.mark.parametrize(
    "name, order",
    [
        ("attention.qkv", [0, 1, 2, 3, 5, 4, 6, 7, *range(8, 24)]),  # queries without their keys
        ("attention.qkv", [4, 5, 6, 7, 0, 1, 2, 3, *range(8, 24)]),  # heads of queries alone
        # One entry of each head, of queries and keys together.
        ("attention.qkv", [4, 1, 2, 3, 0, 5, 6, 7, 12, 9, 10, 11, 8, 13, 14, 15, *range(16, 24)]),
    ],
)
def test_half_a_symmetry_is_none(name, order, checkpoint):
    torch.manual_seed(0)
    net, (x, y) = GPT().double(), text()
    spec = spec_of_computation(net, (x,))
    start = [p.detach() + 0.1 * torch.randn_like(p) for p in net.parameters()]

    def first_update(parameters):
        with torch.no_grad():
            for p, value in zip(net.parameters(), parameters, strict=True):
                p.copy_(value)
        optimizer = NGOptimizer(net.parameters(), checkpoint=checkpoint, model=net)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        return [p.detach() - value for p, value in zip(net.parameters(), parameters, strict=True)]

    expected = exchanged(spec, first_update(start), name, order)
    found = first_update(exchanged(spec, start, name, order))
    far = max((a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True))
    assert far > 1e-3


def test_a_random_symmetry_is_more_than_the_identity():
    for name, case in NETWORKS.items():
        torch.manual_seed(0)
        net, (x, _) = case.make(), case.batch()
        spec = spec_of_computation(net, (x,))
        symmetry = random_symmetry(spec, 0)
        assert (symmetry != range(len(symmetry))).mean() > 0.05, name
