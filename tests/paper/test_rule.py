"""The paper's rule: published sizes, published padding, and what it knows of a network."""

import math

import pytest
import torch
from support import reference
from support.rules import paper_cnn, random_like, random_rule
from torch import Tensor, nn

from l2o_graph.layout.blocks import topology_of
from l2o_graph.paper.embedding import PaddedEmbedding
from l2o_graph.paper.features import Span, raw_numbers, scalars_of
from l2o_graph.paper.rule import PAPER, RuleConfig, UpdateRule
from l2o_graph.paper.step import State, update
from l2o_graph.tracing.by_order import spec_of_module

SMALL = RuleConfig(hidden=8, layers=2, inner=8)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def one_update(rule: UpdateRule, network: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    parameters = list(network.parameters())
    gradients = random_like(parameters, seed, torch.float32)
    state = [State.fresh(p) for p in parameters]
    with torch.no_grad():
        return update(rule, spec_of_module(network), parameters, gradients, state)[0]


# Sizes ------------------------------------------------------------------------------------------


def test_ng_gnn_has_the_published_size():
    rule = UpdateRule(PAPER["ng_gnn"])
    assert count(rule) == 1_384_322
    assert rule.reader.embedding.position.numel() == 640_000
    assert count(rule.head) == 34_306
    assert count(rule.reader.backbone.layers[0]) == 57_664 + 16_640


def test_the_others_have_the_published_sizes():
    assert count(UpdateRule(PAPER["ff"])) == 5_250
    assert count(UpdateRule(PAPER["lstm"])) == 11_554
    class_token = 32  # published, but left out: it shifted every position by one
    assert count(UpdateRule(PAPER["ng_t"])) == 398_466 - class_token


def test_sizes_that_make_no_rule_are_refused():
    with pytest.raises(ValueError, match="layers: expected at least 1, found 0"):
        RuleConfig(layers=0)


@pytest.mark.parametrize("model", PAPER)
def test_every_model_trains_the_published_optimizee(model):
    cnn = paper_cnn(1, 16)
    weights = [p.detach() for p in cnn.parameters()]
    assert sum(w.numel() for w in weights) == 14_378
    for delta, w in zip(one_update(UpdateRule(PAPER[model]), cnn), weights, strict=True):
        assert delta.shape == w.shape
        assert delta.isfinite().all() and delta.any()


# Padding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network, found",
    [
        (nn.Sequential(nn.Conv2d(3, 4, 7), nn.Conv2d(4, 2, 3)), "'0.weight': kernel 7x7"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, (1, 6))), "'1.weight': kernel 1x6"),
        (nn.Sequential(nn.Conv1d(3, 4, 9)), "'0.weight': kernel 9"),
        (nn.Sequential(nn.Conv3d(3, 4, 3)), "'0.weight': kernel 3x3x3"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)),
            "'2.weight': kernel 6x6",
        ),
    ],
)
def test_a_kernel_without_room_is_named(network, found):
    with pytest.raises(ValueError, match=f"{found} exceeds max_kernel 5x5 of the paper preset"):
        one_update(UpdateRule(SMALL), network)


def test_more_positions_than_the_table_has_are_refused():
    embedding = PaddedEmbedding(hidden=4, table=12)
    fitting = topology_of(spec_of_module(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))))
    embedding.check(fitting)
    larger = topology_of(spec_of_module(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 4))))
    with pytest.raises(ValueError, match="table has 12 positions, the network needs 13"):
        embedding.check(larger)


def test_kernels_and_biases_are_padded_as_published():
    """A 3x3 kernel in the centre of 5x5 positions of 14 features, a bias in the centre alone."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, (2, 1)), nn.Conv2d(2, 4, 1))
    network = network.double()
    spec = spec_of_module(network)
    embedding = UpdateRule(SMALL).double().reader.embedding
    weights = [p.detach() for p in network.parameters()]
    gradients = random_like(weights, 0)
    values = [reference.features(w, [g]) for w, g in zip(weights, gradients, strict=True)]
    nodes, edges = reference.graph(network, values)
    expected = torch.stack([torch.stack(s) for s in reference.first_edges(embedding, edges)])

    momenta = [g.expand(5, *g.shape) for g in gradients]
    parameters = zip(weights, gradients, momenta, strict=True)
    seen = [raw_numbers(*of, torch.float64) for of in parameters]
    parts = [whole(seen, kernel.parameter, kernel.positions) for kernel in spec.kernels]
    biases = [whole(seen, bias.parameter, ()) for bias in spec.biases]
    found = embedding.edges(scalars_of(seen, parts))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found = embedding.nodes(topology_of(spec), scalars_of(seen, biases))
    states = torch.stack(reference.first_nodes(embedding, nodes))
    torch.testing.assert_close(found, states, rtol=1e-5, atol=1e-5)


def whole(seen: list[Tensor], i: int, positions: tuple[int, ...]) -> Span:
    """All scalars of a parameter."""
    return Span(i, 0, seen[i].shape[1], positions)


@pytest.mark.parametrize("direction, magnitude", [(0.0, 5.0), (2.0, 0.0), (-0.5, 30.0)])
def test_two_numbers_are_read_as_published(direction, magnitude):
    rule = UpdateRule(SMALL)
    with torch.no_grad():
        rule.head.layers[-1].weight.zero_()
        rule.head.layers[-1].bias.copy_(torch.tensor([direction, magnitude]))
    for delta in one_update(rule, paper_cnn(1, 2)):
        expected = 0.01 * direction * math.exp(0.01 * magnitude)
        torch.testing.assert_close(delta, torch.full_like(delta, expected))


# Symmetry ---------------------------------------------------------------------------------------


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(20, 3)
    ).double()


# Orders of inputs, of the neurons of both convolutions, and of outputs.
HIDDEN = ((0, 1), (2, 0, 3, 1), (4, 0, 1, 3, 2), (0, 1, 2))
INPUTS = ((1, 0), *HIDDEN[1:])
OUTPUTS = (*HIDDEN[:-1], (2, 1, 0))


def permuted(tensors: list[Tensor], orders: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """Tensors in the shapes of the chain's parameters, with its neurons in other orders."""
    inputs, first, second, outputs = (list(order) for order in orders)
    kernel1, bias1, scale, shift, kernel2, bias2, linear, bias3 = tensors
    return [
        kernel1[first][:, inputs], bias1[first], scale[first], shift[first],
        kernel2[second][:, first], bias2[second],
        linear.unflatten(1, (5, 4))[outputs][:, second].flatten(1), bias3[outputs],
    ]  # fmt: skip


def error(rule: UpdateRule, orders: tuple[tuple[int, ...], ...]) -> float:
    """How far updates of the permuted network are from the permuted updates, after three steps."""
    network = chain()
    spec, parameters = spec_of_module(network), [p.detach() for p in network.parameters()]
    ends = []
    for there in (True, False):
        now = permuted(parameters, orders) if there else parameters
        state = [State.fresh(p) for p in now]
        for seed in range(3):
            gradients = random_like(parameters, seed)
            gradients = permuted(gradients, orders) if there else gradients
            with torch.no_grad():
                deltas, state = update(rule, spec, now, gradients, state)
            now = [p + 10 * d for p, d in zip(now, deltas, strict=True)]
        ends.append(deltas if there else permuted(deltas, orders))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("model", PAPER)
def test_hidden_neurons_have_no_order(model):
    assert error(random_rule(RuleConfig(model, 8, 2, 8)), HIDDEN) < 1e-9


@pytest.mark.parametrize("model", ["ng_gnn", "ng_t"])
@pytest.mark.parametrize("orders", [INPUTS, OUTPUTS], ids=["inputs", "outputs"])
def test_inputs_and_outputs_of_a_graph_have_one(model, orders):
    assert error(random_rule(RuleConfig(model, 8, 2, 8)), orders) > 1e-3


@pytest.mark.parametrize("model", PAPER)
def test_a_network_permuted_in_part_is_another_network(model):
    """The negative control: rows of one kernel alone, not the columns of the next."""
    rule, network = random_rule(RuleConfig(model, 8, 2, 8)), chain()
    parameters, state = list(network.parameters()), [State.fresh(p) for p in network.parameters()]
    gradients, spec = random_like(parameters, 0), spec_of_module(network)
    order = [1, 0, 2, 3]
    others = [parameters[0][order], *parameters[1:]], [gradients[0][order], *gradients[1:]]
    one, _ = update(rule, spec, parameters, gradients, state)
    other, _ = update(rule, spec, *others, state)
    same = [torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(one, other, strict=True)]
    # What reads neurons tells the norm behind it, whose own scalars are the same in both.
    assert same[2] == (model in ("ff", "lstm"))
    assert torch.allclose(one[0][order], other[0], rtol=1e-6) == (model in ("ff", "lstm"))
