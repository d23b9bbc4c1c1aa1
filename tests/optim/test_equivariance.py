"""Hidden neurons have no order: a permuted network gets the permuted update, nothing else does."""

import copy

import pytest
import torch
from hypothesis import given, settings
from support.equivariance import (
    Orders,
    apart,
    error_of_updates,
    flattening,
    identity,
    permutations,
    permuted,
    updates,
)
from support.optimizers import READERS, drop_rounding, tame_controller
from support.rules import random_like, random_rule
from torch import Tensor, nn

from l2o_graph.optim.optimizer import NGOptimizer
from l2o_graph.paper.rule import RuleConfig

CONTROLLERS = {reader: tame_controller(0, reader).double() for reader in READERS}
RULES = {
    model: random_rule(RuleConfig(model=model, hidden=8, layers=2, inner=8))
    for model in ("ng_gnn", "ng_t", "nfn", "lstm", "ff")
}


def trained(network: nn.Sequential, checkpoint, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    optimizer = NGOptimizer(network.parameters(), lr=0.5, checkpoint=checkpoint)
    for _ in range(4):
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


# Fewer networks than above: what is new here, around the updates, is the same for every reader.
@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=4)
@given(permutations())
def test_training_a_permuted_network_is_the_permuted_training(reader, drawn):
    network, shape, orders = drawn
    assert error_of_training(CONTROLLERS[reader], network, shape, orders) < 1e-7


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
