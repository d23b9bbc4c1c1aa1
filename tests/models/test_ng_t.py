"""NG-T against one pair of nodes at a time, and what must not depend on order, or size."""

import math

import pytest
import torch
from hypothesis import given, settings
from support.equivariance import error_of_updates, flattening, identity, permutations
from support.graphs import (
    ALONE_OR_TOGETHER,
    assert_same_with_gradients,
    first_states,
    pairs_of,
    parts_of,
    route_of,
)
from support.graphs import SPECS as SPECS_WITH_EDGES
from support.rules import random_rule
from support.slow_ng_t import LargestTensor, noisy, slow_layer
from torch import nn

from l2o_graph.layout.blocks import topology_of
from l2o_graph.layout.spec import Bias, Kernel, NetSpec, Neurons
from l2o_graph.models.ng_gnn import NGGNN
from l2o_graph.models.ng_t import MOST_PAIRS, NGT, NGTLayer
from l2o_graph.paper.rule import RuleConfig
from l2o_graph.tracing.by_order import spec_of_module

HIDDEN = 4  # of the first states


def joining(pairs: list[tuple[int, int]]) -> NetSpec:
    """Four sets of neurons, the first biased, and a kernel for each pair of sets."""
    sizes = [2, 3, 1, 2]
    kernels = [
        Kernel(i + 1, source, target, (1, sizes[target], sizes[source]))
        for i, (source, target) in enumerate(pairs)
    ]
    return NetSpec(
        names=("bias", *(f"{source}->{target}" for source, target in pairs)),
        shapes=((2,), *((sizes[target], sizes[source]) for source, target in pairs)),
        neurons=tuple(Neurons(str(n), size, "hidden", n) for n, size in enumerate(sizes)),
        kernels=tuple(kernels),
        biases=(Bias(0, 0, 2),),
        loose=(),
    )


SPECS = SPECS_WITH_EDGES | {
    # Two kernels between the same sets, a set that is joined to itself, and one to nothing.
    "tangled": joining([(0, 1), (0, 1), (1, 1), (1, 0), (3, 1)]),
}
FORMULAS = pytest.mark.parametrize(
    "options", [{}, {"axial": True}, {"plain": True}], ids=["released", "axial", "plain"]
)
RANGES = pytest.mark.parametrize("most_pairs", [MOST_PAIRS, 0], ids=["all pairs", "edges"])


# Equality --------------------------------------------------------------------------------------


@FORMULAS
@RANGES
@ALONE_OR_TOGETHER
@pytest.mark.parametrize("name", SPECS)
def test_layer_equals_the_loop_over_pairs(name, together, most_pairs, options):
    topology = topology_of(SPECS[name])
    sizes = {"node": HIDDEN, "edge": 3, "attention": 6, "heads": 2}
    layer = noisy(NGTLayer(**sizes, node_hidden=5, edge_hidden=7, **options))
    nodes, edges = first_states(topology)
    edges = edges[..., :3].detach().requires_grad_()
    route = route_of(topology, together)
    states = parts_of(route, edges)
    found_nodes = layer.node(route.all, route.unjoined(most_pairs), nodes, states)
    states = layer.edge(route, found_nodes, states, last=False)
    found_edges = torch.cat(states, dim=1).flatten(0, 1)
    slow = slow_layer(
        layer, list(nodes), pairs_of(topology), list(edges.flatten(0, 1)), all_pairs=most_pairs > 0
    )
    assert_same_with_gradients(
        [found_nodes, found_edges],
        [torch.stack(part) for part in slow],
        [nodes, edges, *layer.parameters()],
    )


@FORMULAS
@RANGES
@ALONE_OR_TOGETHER
@pytest.mark.parametrize("name", ["cnn", "tangled"])
def test_model_equals_the_loop_over_pairs(name, together, most_pairs, options):
    topology = topology_of(SPECS[name])
    model = noisy(NGT(HIDDEN, layers=2, heads=2, **options, most_pairs=most_pairs))
    nodes, edges = first_states(topology)
    route = route_of(topology, together)
    last_nodes, states = model(route, nodes, parts_of(route, edges))
    last_edges = torch.cat(list(states), dim=1).flatten(0, 1)
    slow = list(nodes), list(edges.flatten(0, 1))
    for layer in model.layers:
        slow = slow_layer(layer, slow[0], pairs_of(topology), slow[1], all_pairs=most_pairs > 0)
    assert_same_with_gradients(
        [last_nodes, last_edges],
        [torch.stack(part) for part in slow],
        [nodes, edges, *model.parameters()],
    )


@FORMULAS
@RANGES
def test_scores_of_any_size_are_finite(most_pairs, options):
    topology = topology_of(SPECS["branched"])
    layer = NGTLayer(HIDDEN, HIDDEN, HIDDEN, 2, HIDDEN, HIDDEN, **options).double()
    nodes, edges = first_states(topology)
    route = route_of(topology, together=False)
    for p in (layer.node.of_node.weight, layer.node.of_edge.weight):
        p.data *= 1e3  # scores in the millions, whose exponentials are not
    states = parts_of(route, edges)
    found = layer.node(route.all, route.unjoined(most_pairs), nodes, states)
    states = layer.edge(route, found, states, last=False)
    (found.sum() + states[0].square().sum()).backward()
    assert found.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


# What is told apart and what is not ------------------------------------------------------------


def rule_with(options: dict[str, bool], most_pairs: int):
    """A whole optimizer, since only its first states tell inputs and outputs apart."""
    rule = random_rule(RuleConfig("ng_gnn", 8, 2, 8))
    (name,) = [name for name, module in rule.named_modules() if isinstance(module, NGGNN)]
    rule.set_submodule(name, noisy(NGT(8, 2, **options, most_pairs=most_pairs)))
    return rule


@FORMULAS
@RANGES
@settings(max_examples=10)
@given(permutations())
def test_updates_of_a_permuted_network_are_the_permuted_updates(most_pairs, options, drawn):
    network, _, orders = drawn
    rule = rule_with(options, most_pairs)
    assert error_of_updates(rule, network, orders, steps=2) < 1e-5  # the second with a state


@FORMULAS
@RANGES
@pytest.mark.parametrize("of", [0, -1], ids=["inputs", "outputs"])
def test_inputs_and_outputs_have_an_order(of, most_pairs, options):
    network = flattening()
    orders = identity(network)
    orders[of] = orders[of].flip(0)
    assert error_of_updates(rule_with(options, most_pairs), network, orders, steps=2) > 1e-3


@FORMULAS
def test_the_two_directions_of_an_edge_are_told_apart(options):
    topology = topology_of(SPECS["mlp"])
    model = noisy(NGT(HIDDEN, layers=1, **options))
    nodes, edges = first_states(topology)
    there, _ = model(route_of(topology), nodes, [edges])
    swapped, _ = model(route_of(topology), nodes, [edges.flip(0)])
    assert (there - swapped).abs().max() > 1e-3


@FORMULAS
@RANGES
def test_gradient_reaches_every_weight(most_pairs, options):
    topology = topology_of(SPECS["mlp"])
    model = NGT(HIDDEN, layers=2, heads=2, **options, most_pairs=most_pairs).double()
    nodes, edges = first_states(topology)
    last, states = model(route_of(topology), nodes, [edges])
    outputs = [last, *states]
    sum((torch.randn_like(x) * x).sum() for x in outputs).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-6, name


# Size ------------------------------------------------------------------------------------------


def largest_tensor(spec: NetSpec) -> int:
    """In a forward pass, with the edges read at its end."""
    topology = topology_of(spec)
    model = NGT(4, layers=2, heads=1)
    with torch.no_grad(), LargestTensor() as largest:
        nodes, edges = torch.zeros(spec.num_nodes, 4), torch.zeros(2, spec.num_edges, 4)
        model(route_of(topology), nodes, [edges])
    return largest.entries


def test_all_pairs_are_attended_to_only_while_they_are_few():
    at_most = math.isqrt(MOST_PAIRS)
    few, many = (spec_of_module(nn.Linear(n - 1, 1)) for n in (at_most, at_most + 1))
    assert largest_tensor(few) >= few.num_nodes**2
    assert largest_tensor(many) < many.num_nodes**2 / 10


# Parameters ------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_blocks_have_the_parameters_of_the_published_classifiers():
    sizes = {"node": 64, "edge": 32, "attention": 128, "heads": 8}
    released, paper = (
        NGTLayer(**sizes, node_hidden=128, edge_hidden=64, axial=axial) for axial in (False, True)
    )
    assert (count(paper.node), count(paper.edge)) == (65_920, 13_600)
    assert (count(released.node), count(released.edge)) == (70_080, 18_816)
    # First states, four layers of which the last updates no edges, and a head. The released
    # code without probes, and the paper's count with 64 of them.
    assert 30_208 + 4 * count(released.node) + 3 * count(released.edge) + 9_610 == 376_586
    assert 47_488 + 4 * count(paper.node) + 3 * count(paper.edge) + 26_122 == 378_090


def test_model_has_the_parameters_of_the_published_optimizer():
    model = NGT(32, layers=2, heads=4, edge_hidden=64, axial=True)
    assert count(model) == 48_064
    # A table of 10,000 positions; two layers each for the first states of nodes and of edges,
    # from 14 features at 25 positions; a class token; a readout of three layers; and the head.
    square, embedding = 32 * 32 + 32, 14 * 25 * 32 + 32
    head = (46 * 32 + 32) + square + (32 * 2 + 2)
    table, token = 10_000 * 32, 32
    assert table + 2 * (embedding + square) + token + count(model) + 3 * square + head == 398_466


def test_linear_layers_start_at_xavier_weights_and_zero_biases():
    for layer in NGTLayer(64, 32, 128, 8, 128, 64, axial=True).modules():
        if isinstance(layer, nn.Linear):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert layer.bias is None or not layer.bias.any()


def test_heads_that_do_not_share_the_channels_are_refused():
    with pytest.raises(ValueError, match="expected a multiple of 4 heads, found 18 channels"):
        NGT(18, heads=4)
