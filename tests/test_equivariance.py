"""Hidden neurons have no order: a permuted network gets the permuted update, nothing else does."""

import copy
import itertools

import pytest
import torch
from conftest import random_like, random_rule
from helpers_optimizer import READERS, drop_rounding, tame_controller
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from l2o_graph.optim.blocks import blocks_of
from l2o_graph.optim.controller import Controller
from l2o_graph.optim.memory import arrange, gathered, scattered
from l2o_graph.optim.optimizer import NGOptimizer
from l2o_graph.optim.step import advance
from l2o_graph.paper.rule import RuleConfig, UpdateRule
from l2o_graph.paper.step import State, update
from l2o_graph.tracing.by_order import spec_of_module

CONTROLLERS = {reader: tame_controller(0, reader).double() for reader in READERS}
RULES = {
    model: random_rule(RuleConfig(model=model, hidden=8, layers=2, inner=8))
    for model in ("ng_gnn", "ng_t", "nfn", "lstm", "ff")
}
IMAGES = [(3, 3), (1, 5)]  # a map that flattens to a square kernel, and one that does not

Orders = list[Tensor]  # for each set of neurons, the order in which to put them


@st.composite
def mlps(draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    """An MLP with one to four hidden layers, and the shape of what it reads."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=3, max_size=6))
    layers: list[nn.Module] = []
    for source, target in itertools.pairwise(sizes):
        layers += [nn.Linear(source, target, bias=draw(st.booleans())), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double(), (sizes[0],)


@st.composite
def cnns(draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Two to four convolutions, some with norms, then pooling or flattening and a linear layer."""
    image = draw(st.sampled_from(IMAGES))
    channels = draw(st.lists(st.integers(2, 4), min_size=3, max_size=5))
    layers: list[nn.Module] = []
    for source, target in itertools.pairwise(channels):
        size, follow = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from(["", "bias", "norm"]))
        layers.append(nn.Conv2d(source, target, size, padding=size // 2, bias=follow == "bias"))
        layers += [nn.BatchNorm2d(target)] if follow == "norm" else []
        layers.append(nn.ReLU())
    pooled = draw(st.booleans())
    layers += [nn.AdaptiveAvgPool2d(1)] if pooled else []
    columns = channels[-1] if pooled else channels[-1] * image[0] * image[1]
    layers += [nn.Flatten(), nn.Linear(columns, 3, bias=draw(st.booleans()))]
    return nn.Sequential(*layers).double(), (channels[0], *image)


@st.composite
def permutations(draw):
    """A network, the shape of what it reads, and an order for each of its sets of neurons."""
    torch.manual_seed(draw(st.integers(0, 10**6)))  # of the weights, and of the data later
    network, shape = draw(mlps() | cnns())
    orders = identity(network)
    for n in range(1, len(orders) - 1):
        orders[n] = torch.tensor(draw(st.permutations(orders[n].tolist())))
    return network, shape, orders


def kernels_of(network: nn.Sequential) -> list[nn.Module]:
    return [layer for layer in network if isinstance(layer, (nn.Linear, nn.Conv2d))]


def identity(network: nn.Sequential) -> Orders:
    kernels = kernels_of(network)
    sizes = [kernels[0].weight.shape[1], *[kernel.weight.shape[0] for kernel in kernels]]
    return [torch.arange(size) for size in sizes]


def permuted(network: nn.Sequential, tensors: list[Tensor], orders: Orders) -> list[Tensor]:
    """Tensors in the shapes of the network's parameters, with its neurons in other orders."""
    queue, answer, at = list(tensors), [], 0
    for layer in network:
        own = [queue.pop(0) for _ in layer.parameters()]
        if layer in kernels_of(network):
            # Each source's columns lie together: one for a kernel, all pixels of a flattened map.
            blocks = own[0].unflatten(1, (len(orders[at]), -1))[:, orders[at]]
            own[0] = blocks.reshape(own[0].shape)
            at += 1
            own[0] = own[0][orders[at]]
            own[1:] = [bias[orders[at]] for bias in own[1:]]
        else:
            own = [vector[orders[at]] for vector in own]
        answer += own
    return answer


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of each tensor."""
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
        for a, b in zip(found, expected, strict=True)
    )


Rule = UpdateRule | Controller


def updates(rule: Rule, network, parameters, gradients) -> list[list[Tensor]]:
    """Those of some steps, from given parameters and gradients."""
    spec, answer = spec_of_module(network), []
    state = [State.fresh(p) for p in parameters]
    memory = arrange(spec, blocks_of(spec), 1, like=parameters[0])

    def flat(tensors: list[Tensor]) -> list[Tensor]:
        return gathered(memory, [t.reshape(1, -1) for t in tensors])

    with torch.no_grad():
        for each in gradients:
            if isinstance(rule, Controller):
                steps, _ = advance(
                    rule.config, rule.weights(), memory, flat(each), flat(parameters)
                )
                found = scattered(memory, steps)
                deltas = [found[i].view(p.shape).clone() for i, p in enumerate(parameters)]
            else:
                deltas, state = update(rule, spec, parameters, each, state)
            parameters = [p + d for p, d in zip(parameters, deltas, strict=True)]
            answer.append(deltas)
    return answer


def error_of_updates(rule: Rule, network: nn.Sequential, orders: Orders) -> float:
    """How far the updates of the permuted network are from the permuted updates."""
    parameters = [p.detach() for p in network.parameters()]
    gradients = [random_like(parameters, seed) for seed in range(5)]
    for each in gradients:
        each[0][0, 0] = 0  # a parameter without a gradient
    moved = [permuted(network, tensors, orders) for tensors in (parameters, *gradients)]
    found = updates(rule, network, moved[0], moved[1:])
    expected = updates(rule, network, parameters, gradients)
    return max(apart(a, permuted(network, b, orders)) for a, b in zip(found, expected, strict=True))


def trained(network: nn.Sequential, checkpoint, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    optimizer = NGOptimizer(network.parameters(), lr=0.5, checkpoint=checkpoint)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        drop_rounding(network.parameters())
        optimizer.step()
    return [p.detach() for p in network.parameters()]


def error_of_training(checkpoint, network: nn.Sequential, shape, orders: Orders) -> float:
    """The same for whole training runs on permuted data, in the distance that parameters went."""
    inputs, labels = torch.randn(6, *shape, dtype=torch.float64), torch.arange(6) % len(orders[-1])
    start = [p.detach().clone() for p in network.parameters()]
    start_there = permuted(network, start, orders)
    there = copy.deepcopy(network)
    with torch.no_grad():
        for p, moved in zip(there.parameters(), start_there, strict=True):
            p.copy_(moved)
    end = trained(network, checkpoint, inputs, labels)
    end_there = trained(there, checkpoint, inputs[:, orders[0]], orders[-1].argsort()[labels])
    went = [b - a for a, b in zip(start, end, strict=True)]
    went_there = [b - a for a, b in zip(start_there, end_there, strict=True)]
    return apart(went_there, permuted(network, went, orders))


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=10)
@given(permutations())
def test_updates_of_a_permuted_network_are_the_permuted_updates(reader, drawn):
    network, _, orders = drawn
    assert error_of_updates(CONTROLLERS[reader], network, orders) < 1e-9


@pytest.mark.parametrize("model", RULES)
@settings(max_examples=10)
@given(permutations())
def test_so_are_those_of_the_rule_of_the_paper(model, drawn):
    network, _, orders = drawn
    assert error_of_updates(RULES[model], network, orders) < 1e-5


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=10)
@given(permutations())
def test_training_a_permuted_network_is_the_permuted_training(reader, drawn):
    network, shape, orders = drawn
    assert error_of_training(CONTROLLERS[reader], network, shape, orders) < 1e-7


def flattening() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)
    ).double()


def test_the_columns_of_a_flattened_map_are_permuted_channel_by_channel():
    """The test's own permutation, in the function that a network computes."""
    network, orders = flattening(), [torch.arange(2), torch.tensor([2, 0, 3, 1]), torch.arange(3)]
    other = copy.deepcopy(network)
    moved = permuted(network, [p.detach() for p in network.parameters()], orders)
    nn.utils.vector_to_parameters(torch.cat([p.flatten() for p in moved]), other.parameters())
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(network(x), other(x))
    assert not torch.equal(network[3].weight, other[3].weight)


# Inputs and outputs have no order for it either, as for AdamW. ----------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("of", [0, -1], ids=["inputs", "outputs"])
def test_inputs_and_outputs_may_be_permuted_too(reader, of):
    for network in (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)).double(), flattening()):
        orders = identity(network)
        orders[of] = orders[of].flip(0)
        assert error_of_updates(CONTROLLERS[reader], network, orders) < 1e-9


# Negative controls: what is no symmetry of a network must not be one of its optimizer. ----------

KNOW_NEURONS = ["messages", "attention"]


@pytest.mark.parametrize("model", RULES)
@pytest.mark.parametrize("of", [0, -1], ids=["inputs", "outputs"])
def test_the_rule_of_the_paper_tells_inputs_and_outputs_apart(model, of):
    network = flattening()
    orders = identity(network)
    orders[of] = orders[of].flip(0)
    blind = model in ("ff", "lstm")
    assert (error_of_updates(RULES[model], network, orders) > 1e-3) is not blind


@pytest.mark.parametrize("reader", [r for r in READERS if r != "none"])
def test_hidden_layers_have_an_order(reader):
    """The same weights in another layer are another network."""
    network = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]).double()
    parameters = [p.detach() for p in network.parameters()]
    gradients = [random_like(parameters, seed) for seed in range(3)]
    swap = [0, 1, 4, 5, 2, 3, 6, 7]
    swapped = [[tensors[i] for i in swap] for tensors in (parameters, *gradients)]
    expected = updates(CONTROLLERS[reader], network, parameters, gradients)[-1]
    found = updates(CONTROLLERS[reader], network, swapped[0], swapped[1:])[-1]
    assert apart(found, [expected[i] for i in swap]) > 1e-4


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("layer", [0, 1])
def test_permuting_only_one_of_two_adjacent_kernels_is_no_symmetry(reader, layer):
    """But for readers that know no neurons, who cannot tell."""
    network = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    parameters = [p.detach() for p in network.parameters()]
    gradients = [random_like(parameters, seed) for seed in range(3)]
    orders = [torch.arange(4), torch.tensor([1, 2, 3, 4, 0]), torch.arange(3)]

    def half(tensors: list[Tensor]) -> list[Tensor]:
        moved = permuted(network, tensors, orders)
        return [moved[0], tensors[1]] if layer == 0 else [tensors[0], moved[1]]

    expected = updates(CONTROLLERS[reader], network, parameters, gradients)[-1]
    found = updates(CONTROLLERS[reader], network, half(parameters), [half(g) for g in gradients])
    error = apart(found[-1], half(expected))
    assert error > 1e-3 if reader in KNOW_NEURONS else error < 1e-9
