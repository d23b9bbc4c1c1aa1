"""Several networks in one pass: each gets the answer that it gets alone."""

import pytest
import torch
from support.graphs import ALONE_OR_TOGETHER, SPECS, first_states, parts_of, route_of
from support.networks import NETWORKS
from torch import Tensor, nn

from l2o_graph import NeuralGraph, neural_graph
from l2o_graph.layout.blocks import topology_of
from l2o_graph.layout.grids import grid_route
from l2o_graph.layout.spec import NetSpec
from l2o_graph.models.nfn import NFN
from l2o_graph.models.ng_gnn import NGGNN
from l2o_graph.models.ng_t import NGT
from l2o_graph.tracing import spec_of_computation

MODELS = {
    "ng_gnn": lambda: NGGNN(4, 3),
    "nfn": lambda: NFN(4, 3),
    "ng_t": lambda: NGT(4, 2, 2),
    "ng_t, axial": lambda: NGT(4, 2, 2, axial=True),
    "ng_t, edges": lambda: NGT(4, 2, 2, most_pairs=0),
    "ng_t, plain": lambda: NGT(4, 2, 2, plain=True),
    "ng_t, both": lambda: NGT(4, 2, 2, most_pairs=100),  # of small networks all pairs
}


def specs() -> list[NetSpec]:
    traced = []
    for name in ("gpt", "resnet", "lstm"):
        torch.manual_seed(0)
        net, (x, _) = NETWORKS[name].make(), NETWORKS[name].batch()
        traced.append(spec_of_computation(net, (x,)))
    return [SPECS["mlp"], traced[0], SPECS["mixed"], traced[1], SPECS["cnn"], traced[2]]


def joint(specs: list[NetSpec]) -> NetSpec:
    graphs = [NeuralGraph(spec, torch.zeros(1, spec.num_parameters)) for spec in specs]
    return NeuralGraph.batch(graphs).spec


def answer(model: nn.Module, spec: NetSpec, nodes: Tensor, edges: Tensor, together: bool):
    route = route_of(topology_of(spec), together)
    nodes, states = model(route, nodes, parts_of(route, edges))
    return nodes, torch.cat(list(states), dim=-2)


@ALONE_OR_TOGETHER
@pytest.mark.parametrize("name", MODELS)
def test_a_network_in_a_batch_is_the_network_alone(name, together):
    torch.manual_seed(1)
    model = MODELS[name]().double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    every = specs()
    states = [first_states(topology_of(spec), seed) for seed, spec in enumerate(every)]
    alone = [answer(model, spec, *both, together) for spec, both in zip(every, states, strict=True)]
    nodes, edges = (torch.cat([s[i] for s in states], dim=i) for i in (0, 1))
    found = answer(model, joint(every), nodes, edges, together)
    torch.testing.assert_close(found[0], torch.cat([a for a, _ in alone]), rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1], torch.cat([b for _, b in alone], 1), rtol=0, atol=1e-9)


@ALONE_OR_TOGETHER
@pytest.mark.parametrize("network", ["mlp", "mixed"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "nfn"])
def test_batch_axes_hold_networks_of_one_architecture(name, network, together):
    torch.manual_seed(1)
    spec, model = SPECS[network], MODELS[name]().double()
    states = [first_states(topology_of(spec), seed) for seed in range(6)]
    alone = [answer(model, spec, *both, together) for both in states]
    nodes, edges = (torch.stack([s[i] for s in states]).unflatten(0, (2, 3)) for i in (0, 1))
    found = answer(model, spec, nodes, edges, together)
    for part, separate in zip(found, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(part.flatten(0, 1), torch.stack(separate), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "nfn"])
def test_nodes_that_are_read_need_the_last_messages_that_reach_them_alone(name):
    torch.manual_seed(1)
    topology, model = topology_of(SPECS["mlp"]), MODELS[name]().double()
    if isinstance(model, NGT):
        model.layers[-1].edge = None
    route = route_of(topology, together=False)
    nodes, edges = first_states(topology)
    states = parts_of(route, edges)
    every, _ = model(route, nodes, states)
    some, _ = model(grid_route(topology, route.device, outputs=True), nodes, states)
    outputs = slice(topology.node_start[-1], None)
    torch.testing.assert_close(some[outputs], every[outputs], rtol=0, atol=1e-12)


def test_a_batch_knows_its_networks():
    every = specs()
    batch = joint(every)
    sizes = [spec.num_nodes for spec in every]
    assert [stop - start for start, stop in topology_of(batch).networks] == sizes
    assert batch.num_parameters == sum(spec.num_parameters for spec in every)
    assert batch.num_edges == sum(spec.num_edges for spec in every)
    assert len(batch.loose) == sum(len(spec.loose) for spec in every)
    constants = [k for k in batch.kernels if batch.is_constant(k.parameter)]
    assert len(constants) == sum(s.is_constant(k.parameter) for s in every for k in s.kernels)


def test_a_batch_of_graphs_holds_the_values_of_each():
    networks = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), nn.Linear(5, 1)]
    graphs = [neural_graph(network) for network in networks]
    batch = NeuralGraph.batch(graphs)
    values = [p for network in networks for p in network.parameters()]
    for p, found in zip(values, batch.parameters(), strict=True):
        assert torch.equal(p, found)
    back = NeuralGraph.from_data(batch.to_data())
    assert back.spec == batch.spec and torch.equal(back.values, batch.values)


def test_graphs_that_do_not_fit_together_are_refused():
    one = neural_graph(nn.Linear(2, 3))
    two = NeuralGraph(one.spec, one.values.repeat(2, 1))
    with pytest.raises(ValueError, match=r"expected graphs with one number .*, found \[1, 2\]"):
        NeuralGraph.batch([one, two])
    with pytest.raises(ValueError, match=r"found \[\]"):
        NeuralGraph.batch([])
