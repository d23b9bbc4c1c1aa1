import copy

import pytest
import torch
from support import reference
from support.graphs import (
    ALONE_OR_TOGETHER,
    HIDDEN,
    SPECS,
    assert_same_with_gradients,
    first_states,
    pairs_of,
    parts_of,
    route_of,
    walked,
)
from torch import nn
from torch_geometric.nn import DegreeScalerAggregation, LayerNorm

from l2o_graph.layout.blocks import topology_of
from l2o_graph.models.ng_gnn import NGGNN, GraphNorm, NGGNNLayer, keep_nodes

BOTH_WAYS_OR_ALONG = pytest.mark.parametrize("reverse", [True, False])


@BOTH_WAYS_OR_ALONG
@ALONE_OR_TOGETHER
@pytest.mark.parametrize("name", SPECS)
def test_layer_equals_the_loop_over_edges(name, together, reverse):
    topology = topology_of(SPECS[name])
    torch.manual_seed(1)
    layer = NGGNNLayer(HIDDEN, delta=1.7).double()
    pairs, planes = walked(topology, reverse)
    nodes, edges = first_states(topology, planes=planes)
    route = route_of(topology, together, reverse)
    states = parts_of(route, edges)

    next_nodes = layer.next_nodes(route.all, nodes, states)
    parts = layer.next_edges(route.all, next_nodes, states)
    found = [next_nodes, layer.out(torch.cat(parts, dim=1)).flatten(0, 1)]

    slow_nodes = reference.next_nodes(layer, list(nodes), pairs, list(edges.flatten(0, 1)))
    slow_edges = reference.next_edges(layer, slow_nodes, pairs, list(edges.flatten(0, 1)))
    expected = [torch.stack(slow_nodes), torch.stack(slow_edges)]
    assert_same_with_gradients(found, expected, [nodes, edges, *layer.parameters()])


@BOTH_WAYS_OR_ALONG
@ALONE_OR_TOGETHER
@pytest.mark.parametrize("name", SPECS)
def test_model_equals_the_loop_over_edges(name, together, reverse):
    topology = topology_of(SPECS[name])
    torch.manual_seed(2)
    model = NGGNN(HIDDEN, layers=3).double()
    for p in model.norms.parameters():
        nn.init.normal_(p)
    pairs, planes = walked(topology, reverse)
    nodes, edges = first_states(topology, planes=planes)
    route = route_of(topology, together, reverse)
    last_nodes, states = model(route, nodes, parts_of(route, edges))
    last_edges = torch.cat(list(states), dim=1)
    slow = reference.ng_gnn(model, list(nodes), pairs, list(edges.flatten(0, 1)))
    assert_same_with_gradients(
        [last_nodes, last_edges.flatten(0, 1)],
        [torch.stack(states) for states in slow],
        [nodes, edges, *model.parameters()],
    )


@pytest.mark.parametrize("name", SPECS)
def test_aggregation_equals_torch_geometric(name):
    topology = topology_of(SPECS[name])
    pna = DegreeScalerAggregation(
        ["mean", "min", "max", "std"], ["identity", "amplification"], deg=torch.tensor([0, 3, 5, 2])
    ).double()
    layer = NGGNNLayer(HIDDEN, delta=pna.avg_deg_log.item()).double()
    nodes, edges = first_states(topology)
    route = route_of(topology)
    (messages,) = (each.flatten(0, 1) for each in layer.messages(route.all, nodes, [edges]))
    targets = torch.tensor([target for _, target in pairs_of(topology)])
    gathered = pna(messages, targets, dim_size=len(nodes))
    expected = layer.mix(layer.node(torch.cat([nodes, gathered], dim=1)))
    found = layer.next_nodes(route.all, nodes, [edges])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_norm_equals_torch_geometric():
    ours, theirs = GraphNorm(HIDDEN), LayerNorm(HIDDEN, mode="graph")
    for p in ours.parameters():
        nn.init.normal_(p)
    theirs.load_state_dict(ours.state_dict())
    x = 3 * torch.randn(2, HIDDEN) + 5
    torch.testing.assert_close(ours(x, route_of(topology_of(SPECS["one edge"]))), theirs(x))


def test_norm_of_equal_nodes_is_finite_forward_and_backward():
    x = torch.full((2, HIDDEN), 2.0, requires_grad=True)
    answer = GraphNorm(HIDDEN)(x, route_of(topology_of(SPECS["one edge"])))
    answer.sum().backward()
    assert not answer.any()
    assert x.grad is not None and x.grad.isfinite().all()


def test_the_two_directions_of_an_edge_are_told_apart():
    topology = topology_of(SPECS["mlp"])
    layer = NGGNNLayer(HIDDEN, delta=1.0).double()
    nodes, edges = first_states(topology)
    walk = route_of(topology).all
    there = layer.next_nodes(walk, nodes, [edges])
    swapped = layer.next_nodes(walk, nodes, [edges.flip(0)])
    assert (there - swapped).abs().max() > 1e-3


def test_kept_nodes_pass_through_a_round_unshrunk():
    torch.manual_seed(0)
    model = NGGNN(hidden=16, layers=3)
    before = copy.deepcopy(model.state_dict())
    own = [layer.mix.weight @ layer.node.weight[:, :16] for layer in model.layers]
    assert all(map_.svd().S.max() < 0.8 for map_ in own)
    keep_nodes(model)
    for layer in model.layers:
        map_ = layer.mix.weight @ layer.node.weight[:, :16]
        torch.testing.assert_close(map_ @ map_.T, torch.eye(16), atol=1e-5, rtol=0)
        layer.node.weight.data[:, :16] = 0
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"layers.{k}.{name}.weight" for k in range(3) for name in ("mix", "node")}
    for k, layer in enumerate(model.layers):
        assert torch.equal(layer.node.weight[:, 16:], before[f"layers.{k}.node.weight"][:, 16:])
