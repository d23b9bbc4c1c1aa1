"""Small structures with first states, and edges as pairs."""

import itertools

import pytest
import torch
from torch import nn

from l2o_graph.layout.blocks import Topology
from l2o_graph.layout.grids import GridRoute, grid_route
from l2o_graph.layout.spec import Kernel, NetSpec, Neurons
from l2o_graph.tracing.by_order import spec_of_module

HIDDEN = 4


def branched() -> NetSpec:
    """Two hidden sets side by side and a skip: several kernels into a set and out of one."""
    sets = [("input", 2, "input", 0), ("a", 3, "hidden", 0), ("b", 1, "hidden", 1)]
    sets += [("output", 2, "output", 0)]
    pairs = [(0, 1), (0, 2), (1, 3), (2, 3), (0, 3)]
    return NetSpec(
        names=tuple(f"{source}->{target}" for source, target in pairs),
        shapes=tuple((sets[target][1], sets[source][1]) for source, target in pairs),
        neurons=tuple(Neurons(*one) for one in sets),
        kernels=tuple(
            Kernel(i, *pair, grid=(1, sets[pair[1]][1], sets[pair[0]][1]))
            for i, pair in enumerate(pairs)
        ),
        biases=(),
        loose=(),
    )


def mixed() -> NetSpec:
    """Grids of every kind: groups, a diagonal, parts of sets, rows that are read, a recurrence."""
    sizes = [4, 6, 6, 2]
    kernels = [
        Kernel(0, 0, 1, (2, 3, 2), (3,)),  # a convolution in two groups
        Kernel(1, 1, 2, (6, 1, 1)),  # a scale
        Kernel(5, 0, 2, (4, 1, 1), target_start=1),  # a skip of the constant 1
        Kernel(6, 0, 2, (2, 1, 2), target_start=4),  # sums of pairs, of the constant 2
        Kernel(2, 2, 3, (1, 3, 2), source_start=3, from_rows=True),  # a part of a set
        Kernel(3, 1, 1, (1, 6, 6)),
        Kernel(2, 2, 3, (1, 2, 2), start=2, source_start=1, from_rows=True, again=True),
        Kernel(4, 0, 2, (2, 2, 3), from_rows=True),  # transposed, in groups
    ]
    return NetSpec(
        names=tuple("abcde"),
        shapes=((6, 2, 3), (6,), (3, 2), (6, 6), (4, 3)),
        neurons=tuple(Neurons(str(n), size, "hidden", n) for n, size in enumerate(sizes)),
        kernels=tuple(kernels),
        biases=(),
        loose=(),
    )


SPECS = {
    "mlp": spec_of_module(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))),
    # Every node but the middle one has a single edge: its deviation is that of one message.
    "star": spec_of_module(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2))),
    "one edge": spec_of_module(nn.Linear(1, 1)),
    "cnn": spec_of_module(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))),
    "branched": branched(),
    "mixed": mixed(),
}


def pairs_of(topology: Topology) -> list[tuple[int, int]]:
    """(source, target) of every edge, all forward ones first."""
    forward = []
    for kernel in topology.spec.kernels:
        groups, rows, columns = kernel.grid
        source = topology.node_start[kernel.source] + kernel.source_start
        target = topology.node_start[kernel.target] + kernel.target_start
        for g, r, c in itertools.product(range(groups), range(rows), range(columns)):
            row, column = g * rows + r, g * columns + c
            of, to = (row, column) if kernel.from_rows else (column, row)
            forward.append((source + of, target + to))
    return forward + [(target, source) for source, target in forward]


def first_states(
    topology: Topology, seed: int = 0, planes: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random nodes (N, H) and edges (P, E, H), a few edges exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    spec = topology.spec
    nodes = torch.randn(spec.num_nodes, HIDDEN, generator=generator, dtype=torch.float64)
    edges = torch.randn(planes, spec.num_edges, HIDDEN, generator=generator, dtype=torch.float64)
    edges[:, ::3] = 0
    return nodes.requires_grad_(), edges.requires_grad_()


def walked(topology: Topology, reverse: bool) -> tuple[list[tuple[int, int]], int]:
    """The pairs that messages take, and the planes that their edges lie in."""
    pairs = pairs_of(topology)
    return (pairs, 2) if reverse else (pairs[: len(pairs) // 2], 1)


ALONE_OR_TOGETHER = pytest.mark.parametrize("together", [True, False])


def route_of(topology: Topology, together: bool = True, both: bool = True) -> GridRoute:
    """All kernels in one chunk, or each in one of its own."""
    return grid_route(topology, torch.device("cpu"), together, both)


def parts_of(route: GridRoute, edges: torch.Tensor) -> list[torch.Tensor]:
    """First states of the edges of each chunk, from those of all."""
    sizes = [sum(block.edges for block in chunk) for chunk in route.all.chunks]
    return list(edges.split(sizes, dim=-2))


def assert_same_with_gradients(found, expected, leaves):
    """Outputs agree to 1e-5, and so do the gradients of a random function of them."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    weights = [torch.randn_like(a) for a in found]
    gradients = []
    for outputs in (found, expected):
        loss = sum((w * o).sum() for w, o in zip(weights, outputs, strict=True))
        gradients.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*gradients, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
