import math

import pytest
import reference
import torch
from conftest import paper_cnn, random_like, random_rule
from torch import nn

from l2o_graph.graph import topology_of
from l2o_graph.inference import spec_of_module
from l2o_graph.models.embedding import PaddedEmbedding, Part
from l2o_graph.observation import Observation, observe, scalars_of
from l2o_graph.rule import PAPER, RuleConfig, UpdateRule
from l2o_graph.step import State, update

SMALL_PAPER = RuleConfig("paper", hidden=8, layers=2, inner=8)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def one_update(rule: UpdateRule, network: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    parameters = list(network.parameters())
    gradients = random_like(parameters, seed, torch.float32)
    state = [State.fresh(p) for p in parameters]
    with torch.no_grad():
        return update(rule, spec_of_module(network), parameters, gradients, state)[0]


def test_paper_preset_has_the_published_size():
    rule = UpdateRule(PAPER["ng_gnn"])
    assert count(rule) == 1_384_322
    assert rule.reader.embedding.position.numel() == 640_000
    assert count(rule.head) == 34_306
    assert count(rule.reader.backbone.layers[0]) == 57_664 + 16_640


def test_default_is_smaller_than_the_published_rule_without_its_table():
    assert count(UpdateRule(RuleConfig())) < 744_322 / 10


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
def test_paper_preset_names_the_kernel_it_has_no_room_for(network, found):
    with pytest.raises(ValueError, match=f"{found} exceeds max_kernel 5x5 of the paper preset"):
        one_update(UpdateRule(SMALL_PAPER), network)


def test_paper_preset_refuses_more_positions_than_its_table_has():
    embedding = PaddedEmbedding(hidden=4, table=12)
    fitting = topology_of(spec_of_module(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))))
    embedding.check(fitting)
    larger = topology_of(spec_of_module(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 4))))
    with pytest.raises(ValueError, match="table has 12 positions, the network needs 13"):
        embedding.check(larger)


def test_paper_preset_pads_kernels_and_biases_as_published():
    """A 3x3 kernel in the centre of 5x5 positions of 14 features, a bias in the centre alone."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, (2, 1)), nn.Conv2d(2, 4, 1))
    network = network.double()
    spec = spec_of_module(network)
    embedding = UpdateRule(SMALL_PAPER).double().reader.embedding
    weights = [p.detach() for p in network.parameters()]
    histories = [[g] for g in random_like(weights, 0)]
    kernels = {kernel.parameter for kernel in spec.kernels}
    args = zip(weights, histories, strict=True)
    seen = [reference.features(*both, i in kernels)[0][:14] for i, both in enumerate(args)]
    nodes, edges = reference.graph(network, seen)

    forward, reverse = [], []
    for edge in edges:
        height, width = edge.positions
        x = torch.zeros(5, 5, 14, dtype=torch.float64)
        for row in range(height):
            for column in range(width):
                centred = x[(5 - height) // 2 + row, (5 - width) // 2 + column]
                centred[:] = edge.values[:, row * width + column]
        x, nothing = x.flatten(), torch.zeros(350)
        forward.append(embedding.edge(torch.cat([x, nothing, x])))
        reverse.append(embedding.edge(torch.cat([nothing, x, x])))
    first_row = {"input": 0, "hidden": 2, "output": 4}  # 2 inputs and 2 hidden layers
    states = []
    for node in nodes:
        x = torch.zeros(25, 14, dtype=torch.float64)
        if node.values is not None:
            x[12] = node.values
        row = embedding.position[first_row[node.role] + node.index]
        states.append(embedding.node(x.flatten()) + row)

    topology = topology_of(spec)
    momenta = [g.expand(5, *g.shape) for (g,) in histories]
    steps = [torch.zeros(())] * len(weights)
    gradients = [g for (g,) in histories]
    seen = observe(spec, weights, gradients, momenta, steps, torch.float64)
    parts = [whole(seen, kernel.parameter, kernel.positions) for kernel in spec.kernels]
    biases = [whole(seen, bias.parameter, ()) for bias in spec.biases]
    torch.testing.assert_close(
        embedding.edges(scalars_of(seen, parts)),
        torch.stack([torch.stack(forward), torch.stack(reverse)]),
        rtol=1e-5,
        atol=1e-5,
    )
    found = embedding.nodes(topology, scalars_of(seen, biases))
    torch.testing.assert_close(found, torch.stack(states), rtol=1e-5, atol=1e-5)


def whole(seen: list[Observation], i: int, positions: tuple[int, ...]) -> Part:
    """All scalars of a parameter."""
    return Part(i, 0, len(seen[i].weight), positions, seen[i].shared)


@pytest.mark.parametrize("direction, magnitude", [(0.0, 5.0), (2.0, 0.0), (-0.5, 30.0)])
def test_paper_preset_reads_two_numbers_as_published(direction, magnitude):
    rule = UpdateRule(SMALL_PAPER)
    with torch.no_grad():
        rule.head.layers[-1].weight.zero_()
        rule.head.layers[-1].bias.copy_(torch.tensor([direction, magnitude]))
    for delta in one_update(rule, paper_cnn(1, 2)):
        expected = 0.01 * direction * math.exp(0.01 * magnitude)
        torch.testing.assert_close(delta, torch.full_like(delta, expected))


NETWORKS = {
    "7x7 stem": nn.Sequential(nn.Conv2d(3, 4, 7, stride=2), nn.Conv2d(4, 2, 3)),
    "16x16 patch": nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.Conv2d(4, 2, 1)),
    "1d": nn.Sequential(nn.Conv1d(2, 3, 9), nn.Conv1d(3, 2, 1)),
    "3d": nn.Sequential(nn.Conv3d(2, 3, (3, 2, 1)), nn.Conv3d(3, 2, 1)),
    "even": nn.Sequential(nn.Conv2d(2, 3, (2, 4))),
    "flattened": nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 64, 2)),
    "flattened, not square": nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 6, 2)),
    "no kernel": nn.Sequential(nn.LayerNorm(5)),
    "embedding": nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_default_takes_any_kernel(name):
    network = NETWORKS[name]
    deltas = one_update(random_rule(RuleConfig()).float(), network)
    for delta, p in zip(deltas, network.parameters(), strict=True):
        assert delta.shape == p.shape
        assert delta.isfinite().all()
        assert delta.abs().max() > 0


@pytest.mark.parametrize("name", ["7x7 stem", "1d", "3d", "even", "flattened"])
def test_positions_of_a_kernel_are_told_apart(name):
    """Where every scalar of an edge looks the same, only its offset is left to differ by."""
    rule = random_rule(RuleConfig())
    network = NETWORKS[name]
    parameters = [torch.ones_like(p, dtype=torch.float64) for p in network.parameters()]
    state = [State.fresh(p) for p in parameters]
    spec = spec_of_module(network)
    with torch.no_grad():
        deltas, _ = update(rule, spec, parameters, parameters, state)
    for kernel in spec.kernels:
        if math.prod(kernel.positions) > 1:
            cell = deltas[kernel.parameter].flatten()[: math.prod(kernel.positions)]
            assert len(cell.unique()) == len(cell)
