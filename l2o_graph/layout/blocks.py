"""Kernels as blocks: grids, which need no index of their edges.

Nodes are neurons and edges are pairs of neurons joined by a kernel. Nothing is n x n: the edges
of a kernel [out, in, *positions] are the cells of its own (out, in) grid, in the order in which
torch stores it, so what flows into a neuron is a row of the grid and what flows back a column.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph.layout.spec import Bias, Kernel, NetSpec


@dataclass(frozen=True, slots=True)
class KernelBlock:
    """Where the edges of a kernel lie: a grid in each of its groups.

    Attributes:
        kernel: Index of the kernel.
        grid: Groups, rows of each and columns of each.
        rows: Half-open range [start, stop) of the nodes that the rows are.
        columns: The same for the columns.
        from_rows: Whether rows are what is read.
    """

    kernel: int
    grid: tuple[int, int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    from_rows: bool

    @property
    def edges(self) -> int:
        """Edges in all."""
        return math.prod(self.grid)

    @property
    def ends(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Nodes that the edges lead to, and nodes that they leave: one is rows, one columns."""
        return (self.columns, self.rows) if self.from_rows else (self.rows, self.columns)


Chunk = tuple[KernelBlock, ...]  # kernels whose edges have their states in one tensor


@dataclass(frozen=True, eq=False)  # a topology is itself: hashed by identity
class Topology:
    """What stays the same from step to step: where everything lies. Built once for a NetSpec.

    Attributes:
        spec: The network.
        parameter_start: Where each parameter begins among all P scalars.
        node_start: Where each set of neurons begins among all N nodes.
        degree: (N,) edges of each node, those that lead to it and those that leave it.
        in_degree: (N,) edges that lead to each node.
        networks: Half-open range [start, stop) of the nodes of each network of a batch.
    """

    spec: NetSpec
    parameter_start: tuple[int, ...]
    node_start: tuple[int, ...]
    degree: Float[Tensor, " N"]
    in_degree: Float[Tensor, " N"]
    networks: tuple[tuple[int, int], ...]

    def sides(self, kernel: Kernel) -> tuple[int, int]:
        """The first node of a kernel's rows and of its columns."""
        source = self.node_start[kernel.source] + kernel.source_start
        target = self.node_start[kernel.target] + kernel.target_start
        return (source, target) if kernel.from_rows else (target, source)

    def bias(self, bias: Bias) -> tuple[int, int]:
        """Half-open range [start, stop) of the nodes that a bias sits on."""
        start = self.node_start[bias.neurons] + bias.neurons_start
        return start, start + bias.size

    @cached_property
    def blocks(self) -> Chunk:
        """All kernels."""
        blocks = []
        for k, kernel in enumerate(self.spec.kernels):
            groups, rows, columns = kernel.grid
            of_rows, of_columns = self.sides(kernel)
            ends = (of_rows, of_rows + groups * rows), (of_columns, of_columns + groups * columns)
            blocks.append(KernelBlock(k, kernel.grid, *ends, kernel.from_rows))
        return tuple(blocks)


def with_edges(chunk: Chunk) -> Iterator[tuple[KernelBlock, slice]]:
    """The blocks of a chunk, and where their edges lie among those of all."""
    at = 0
    for block in chunk:
        yield block, slice(at, at + block.edges)
        at += block.edges


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def topology_of(spec: NetSpec) -> Topology:
    """The topology of a network; the second call for an equal network costs nothing."""
    node_start, at = [], 0
    for neurons in spec.neurons:
        node_start.append(at)
        at += neurons.size
    degree, in_degree = torch.zeros(2, at, device="cpu")  # also for a model on the meta device
    parameter_start, scalars = [], 0
    for shape in spec.shapes:
        parameter_start.append(scalars)
        scalars += math.prod(shape)
    first = [
        i for i, n in enumerate(spec.neurons) if not i or n.network != spec.neurons[i - 1].network
    ]
    networks = tuple(itertools.pairwise([*(node_start[i] for i in first), at]))
    where = tuple(parameter_start), tuple(node_start)
    topology = Topology(spec, *where, degree, in_degree, networks)
    for block in topology.blocks:
        _, rows, columns = block.grid
        degree[slice(*block.rows)] += columns
        degree[slice(*block.columns)] += rows
        targets, _ = block.ends
        in_degree[slice(*targets)] += rows if block.from_rows else columns
    return topology
