import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.equivariance import error_of_updates
from support.graphs import (
    ALONE_OR_TOGETHER,
    HIDDEN,
    SPECS,
    assert_same_with_gradients,
    first_states,
    pairs_of,
    parts_of,
    route_of,
)
from support.rules import paper_cnn, random_like, random_rule
from torch import Tensor, nn

from l2o_graph.layout.blocks import Topology, topology_of
from l2o_graph.layout.spec import NetSpec
from l2o_graph.models.nfn import NFN, NFNLayer
from l2o_graph.paper.rule import RuleConfig
from l2o_graph.tracing.by_order import spec_of_module, spec_of_parameters


def random_model(layers: int) -> NFN:
    torch.manual_seed(1)
    model = NFN(HIDDEN, layers).double()
    for p in model.parameters():  # norms would multiply by one otherwise
        p.data += 0.1 * torch.randn_like(p)
    return model


def answer(
    model: NFN, topology: Topology, nodes: Tensor, edges: Tensor, together: bool = True
) -> tuple[Tensor, Tensor]:
    route = route_of(topology, together)
    nodes, states = model(route, nodes, parts_of(route, edges))
    return nodes, torch.cat(list(states), dim=1)


# The slow twin: one neuron and one weight at a time. -------------------------------------------


def mean(vectors: list[Tensor]) -> Tensor:
    return torch.stack(vectors).mean(0)


def slow_layer(
    layer: NFNLayer, spec: NetSpec, edges: list[tuple[int, int, int]], nodes, states
) -> tuple[list[Tensor], list[Tensor]]:
    """From the states of nodes and of edges (kernel, source, target)."""
    nothing = states[0].new_zeros(2 * HIDDEN)

    def around(node: int, end: int) -> Tensor:
        """Mean over kernels of the mean of the edges that have the node at one end."""
        of_kernel: dict[int, list[Tensor]] = {}
        for edge, state in zip(edges, states, strict=True):
            if edge[end] == node:
                of_kernel.setdefault(edge[0], []).append(state)
        return mean([mean(own) for own in of_kernel.values()]) if of_kernel else nothing

    contexts = [torch.cat([v, around(i, 2), around(i, 1)]) for i, v in enumerate(nodes)]
    of_set = [n for n, one in enumerate(spec.neurons) for _ in range(one.size)]
    means = [
        mean([c for c, n in zip(contexts, of_set, strict=True) if n == own])
        for own in range(len(spec.neurons))
    ]
    known = [torch.cat([c, means[n]]) for c, n in zip(contexts, of_set, strict=True)]
    next_nodes = [layer.node(torch.cat([c, mean(means)])) for c in known]
    next_states = [
        layer.own(state)
        + layer.target(torch.cat([known[target], mean(means)]))
        + layer.source(known[source])
        for (_, source, target), state in zip(edges, states, strict=True)
    ]
    return next_nodes, next_states


def slow_nfn(model: NFN, topology: Topology, nodes: Tensor, edges: Tensor) -> list[Tensor]:
    spec = topology.spec
    kernel_of = [k for k, kernel in enumerate(spec.kernels) for _ in range(math.prod(kernel.grid))]
    pairs = pairs_of(topology)[: spec.num_edges]
    joined = [(k, *pair) for k, pair in zip(kernel_of, pairs, strict=True)]
    points, states = list(nodes), list(edges.transpose(0, 1).flatten(1))
    norms = zip(model.node_norms, model.edge_norms, strict=True)
    for layer, both in itertools.zip_longest(model.layers, norms):
        points, states = slow_layer(layer, spec, joined, points, states)
        if both is not None:
            points = [activated(both[0], v) for v in points]
            states = [activated(both[1], e) for e in states]
    flat = torch.stack(states)
    return [torch.stack(points), torch.stack([flat[:, :HIDDEN], flat[:, HIDDEN:]])]


def activated(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    scaled = norm.weight * x / (x.square().sum() / len(x) + 1e-5).sqrt()
    return scaled * scaled.sigmoid()


@ALONE_OR_TOGETHER
@pytest.mark.parametrize("name", SPECS)
def test_model_equals_the_loop_over_weights(name, together):
    topology, model = topology_of(SPECS[name]), random_model(2)
    nodes, edges = first_states(topology)
    found = answer(model, topology, nodes, edges, together)
    expected = slow_nfn(model, topology, nodes, edges)
    assert_same_with_gradients(found, expected, [nodes, edges, *model.parameters()])


# Symmetry --------------------------------------------------------------------------------------


def moved(
    topology: Topology, nodes: Tensor, edges: Tensor, orders: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Nodes (N, H) and edges (2, E, H) with every set of neurons in another order."""
    there = torch.cat([topology.node_start[n] + order for n, order in enumerate(orders)])
    grids, at = [], 0
    for kernel in topology.spec.kernels:
        _, out, source = kernel.grid
        grid = edges[:, at : at + out * source].unflatten(1, (out, source))
        grids.append(grid[:, orders[kernel.target]][:, :, orders[kernel.source]].flatten(1, 2))
        at += out * source
    return nodes[there], torch.cat(grids, dim=1)


def apart(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def identity(topology: Topology) -> list[Tensor]:
    return [torch.arange(neurons.size) for neurons in topology.spec.neurons]


def chain(*sizes: int) -> Topology:
    shapes = [(target, source) for source, target in itertools.pairwise(sizes)]
    return topology_of(spec_of_parameters([torch.empty(shape) for shape in shapes]))


@settings(max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), st.booleans(), st.data())
def test_permuted_states_give_the_permuted_answer(sizes, together, data):
    """Inputs and outputs too: what they are, their first states have to say."""
    topology, model = chain(*sizes), random_model(3)
    orders = [
        torch.tensor(data.draw(st.permutations(order.tolist()))) for order in identity(topology)
    ]
    nodes, edges = (x.detach() for x in first_states(topology))
    found = answer(model, topology, *moved(topology, nodes, edges, orders), together)
    expected = moved(topology, *answer(model, topology, nodes, edges, together), orders)
    assert apart(found, expected) < 1e-9


@pytest.mark.parametrize("part", ["nodes", "edges"])
def test_permuting_nodes_or_edges_alone_is_no_symmetry(part):
    topology, model = chain(4, 5, 3), random_model(2)
    orders = identity(topology)
    orders[1] = orders[1].roll(1)

    def half(nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        both = moved(topology, nodes, edges, orders)
        return (both[0], edges) if part == "nodes" else (nodes, both[1])

    states = first_states(topology)
    found = answer(model, topology, *half(*states))
    assert apart(found, half(*answer(model, topology, *states))) > 1e-2


def test_a_chain_has_a_direction():
    """The kernel before and the one after are told apart: a reversed chain is another network."""
    topology, model = chain(3, 3, 3, 3), random_model(1)
    nodes, edges = first_states(topology)
    nodes = torch.ones_like(nodes)
    back = edges.unflatten(1, (3, 3, 3)).flip(1).transpose(2, 3).flatten(1, 3)
    _, found = answer(model, topology, nodes, back)
    _, expected = answer(model, topology, nodes, edges)
    reversed_there = expected.unflatten(1, (3, 3, 3)).flip(1).transpose(2, 3).flatten(1, 3)
    assert (found - reversed_there).abs().max() > 1e-2


# Completeness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [1, 3, 5])
def test_a_kernel_has_every_map_of_np_from_what_touches_it(kernels):
    """With one channel for nodes and two for edges, in and out; see the NP count of equivariant.py.

    To itself a kernel has 4 maps, from each neighbour, and from the nodes at each end, 2, and
    from all that lies further away together 1 of nodes and 1 of kernels.
    """
    torch.manual_seed(0)
    topology, model = chain(*[3] * (kernels + 1)), NFN(1, 1).double()
    nodes, edges = topology.spec.num_nodes, topology.spec.num_edges
    samples = [random_like([torch.empty(nodes, 1), torch.empty(2, edges, 1)], s) for s in range(12)]
    own = slice(9 * (kernels // 2), 9 * (kernels // 2 + 1))  # the kernel in the middle
    columns = []
    for weights in torch.eye(sum(p.numel() for p in model.parameters()), dtype=torch.float64):
        nn.utils.vector_to_parameters(weights, model.parameters())
        with torch.no_grad():
            answers = [answer(model, topology, *sample)[1][:, own] for sample in samples]
        columns.append(torch.stack(answers).flatten())
    rank = torch.linalg.matrix_rank(torch.stack(columns))
    neighbours, far_nodes, far_kernels = 2 * (kernels > 1), kernels > 1, kernels > 3
    from_edges = 2 * (4 + 2 * neighbours + far_kernels)
    from_nodes = 2 * 2 + far_nodes
    assert rank == 2 * (from_edges + from_nodes + 1)


# In use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "branched"])
def test_every_weight_gets_a_gradient(name):
    topology, model = topology_of(SPECS[name]), random_model(3)
    nodes, edges = answer(model, topology, *first_states(topology))
    (nodes.square().sum() + edges.square().sum()).backward()
    for p in model.parameters():
        assert p.grad is not None and (p.grad != 0).all()


def test_answers_keep_their_size_over_many_layers():
    topology = topology_of(spec_of_module(paper_cnn(1, 8)))
    torch.manual_seed(0)
    model = NFN(16, 8)
    for scale in (0.1, 10.0):
        nodes = scale * torch.randn(topology.spec.num_nodes, 16)
        edges = scale * torch.randn(2, topology.spec.num_edges, 16)
        for states in answer(model, topology, nodes, edges):
            assert 0.05 < states.square().mean().sqrt() < 2


def test_states_of_zero_are_finite_forward_and_backward():
    topology, model = topology_of(SPECS["mlp"]), NFN(HIDDEN, 3).double()
    nodes, edges = (torch.zeros_like(x).requires_grad_() for x in first_states(topology))
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # nothing else keeps a state from zero
            nn.init.zeros_(p)
    found = answer(model, topology, nodes, edges)
    gradients = torch.autograd.grad(sum(x.sum() for x in found), [nodes, edges])
    assert not any(x.any() for x in found)
    assert all(x.isfinite().all() and x.any() for x in gradients)


def test_a_rule_can_have_it_for_a_backbone():
    rule = random_rule(RuleConfig(hidden=8, layers=2, inner=8))
    rule.reader.backbone = NFN(8, 2).double()
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(20, 3))
    orders = [torch.arange(2), torch.tensor([2, 0, 3, 1]), torch.arange(5).roll(2), torch.arange(3)]
    network = network.double()
    assert error_of_updates(rule, network, orders) < 1e-5
    orders[-1] = orders[-1].flip(0)
    assert error_of_updates(rule, network, orders) > 1e-3
