import pytest
import torch
from support import reference
from support.graphs import route_of
from support.rules import paper_cnn, random_like
from torch import nn

from l2o_graph.graph.neural import NeuralGraph, neural_graph
from l2o_graph.layout.blocks import topology_of
from l2o_graph.tracing.by_order import spec_of_module


def small_cnn() -> nn.Sequential:
    """Kernels of several sizes, a norm, a layer without bias and a flattened map."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, (1, 2)),
        nn.Flatten(),
        nn.Linear(4 * 6, 3),
    )


NETWORKS = {
    "mlp": nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)),
    "small cnn": small_cnn(),
    "paper": paper_cnn(1, 4),
    "1d": nn.Sequential(nn.Conv1d(2, 3, 5), nn.Flatten(), nn.Linear(3 * 9, 2)),
    "only loose": nn.BatchNorm1d(4),
}


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "only loose"])
def test_data_is_the_graph_built_edge_by_edge(name):
    network = NETWORKS[name]
    values = [p[None] for p in random_like(network.parameters(), 0)]
    nodes, edges = reference.graph(network, values)
    flat = torch.cat([v.flatten(1) for v in values], dim=1)
    data = NeuralGraph(spec_of_module(network), flat).to_data()

    forward = torch.tensor([(e.source, e.target) for e in edges]).T
    assert torch.equal(data.edge_index, torch.cat([forward, forward.flip(0)], dim=1))
    widest = max(e.values.numel() for e in edges)
    attributes = torch.zeros(len(edges), widest, dtype=flat.dtype)
    for n, edge in enumerate(edges):
        attributes[n, : edge.values.numel()] = edge.values.flatten()
    assert torch.equal(data.edge_attr, torch.cat([attributes, attributes]))
    biases = torch.tensor([[0.0 if n.values is None else n.values.item()] for n in nodes])
    assert torch.equal(data.x.float(), biases)
    data.validate(raise_on_error=True)


def test_a_feature_of_data_is_read_before_the_positions():
    network = small_cnn()
    values = torch.randn(2, spec_of_module(network).num_parameters)
    edges = NeuralGraph(spec_of_module(network), values).to_data().edge_attr
    assert torch.equal(edges[0, :9], values[0, :9])
    assert torch.equal(edges[0, 9:], values[1, :9])


def test_counts_of_the_paper_networks():
    data = neural_graph(paper_cnn(3, 32)).to_data()
    assert (data.num_nodes, data.num_edges) == (173, 2 * 6_880)
    assert neural_graph(paper_cnn(1, 16)).to_data().num_nodes == 91


def test_a_weight_of_zero_keeps_its_edge():
    network = small_cnn()
    for p in network.parameters():
        nn.init.zeros_(p)
    spec = spec_of_module(network)
    assert neural_graph(network).to_data().num_edges == 2 * spec.num_edges == 2 * (6 + 3 + 12 + 12)
    degree = [3.0] * 2 + [3.0] * 3 + [5.0] * 3 + [6.0] * 4 + [4.0] * 3
    assert route_of(topology_of(spec)).all.arrivals.degree.tolist() == degree
    into = [0.0] * 2 + [2.0] * 3 + [1.0] * 3 + [3.0] * 4 + [4.0] * 3
    assert route_of(topology_of(spec), both=False).all.arrivals.degree.tolist() == into


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_bit_exact(name):
    network = NETWORKS[name]
    graph = neural_graph(network)
    back = NeuralGraph.from_data(graph.to_data())
    assert back.spec == graph.spec
    for p, there, returned in zip(
        network.parameters(), graph.parameters(), back.parameters(), strict=True
    ):
        assert torch.equal(p, there) and torch.equal(p, returned)


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_of_several_features(name):
    spec = spec_of_module(NETWORKS[name])
    values = torch.randn(3, spec.num_parameters)
    assert torch.equal(NeuralGraph.from_data(NeuralGraph(spec, values).to_data()).values, values)


def test_module_parameters_and_named_parameters_give_one_graph():
    network = small_cnn()
    graph = neural_graph(network)
    for other in (network.parameters(), network.named_parameters()):
        assert torch.equal(neural_graph(other).values, graph.values)
    assert neural_graph(network.named_parameters()).spec.kernels == graph.spec.kernels


def test_a_graph_is_a_copy_and_prints_its_spec():
    network = nn.Linear(2, 2)
    graph = neural_graph(network)
    with torch.no_grad():
        network.weight.zero_()
    assert graph.parameters()[0].abs().min() > 0
    assert not graph.values.requires_grad
    assert str(graph).startswith("NeuralGraph of 4 neurons, 4 edges, 6 parameters")


def test_what_has_no_parameters_is_refused():
    with pytest.raises(ValueError, match="expected a module with parameters, found none"):
        neural_graph(nn.ReLU())
    with pytest.raises(ValueError, match="expected at least one parameter, found an empty list"):
        neural_graph([])


def test_foreign_data_is_refused():
    data = neural_graph(nn.Linear(2, 3)).to_data()
    data.edge_attr = data.edge_attr[:-1]
    with pytest.raises(ValueError, match=r"expected 5 nodes and 12 edges, found \(5, 11\)"):
        NeuralGraph.from_data(data)
    data.edge_attr = None
    with pytest.raises(ValueError, match="expected 5 nodes and 12 edges, found None"):
        NeuralGraph.from_data(data)
    del data.spec
    with pytest.raises(ValueError, match="expected a Data made by NeuralGraph"):
        NeuralGraph.from_data(data)


def test_equal_networks_share_one_topology():
    one, other = spec_of_module(small_cnn()), spec_of_module(small_cnn())
    assert one is not other
    assert topology_of(one) is topology_of(other)
