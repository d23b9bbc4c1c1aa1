"""Kernels as blocks: grids, which need no index of their edges.

Nodes are neurons and edges are pairs of neurons joined by a kernel. Nothing is n x n: the edges
of a kernel [out, in, *positions] are the cells of its own (out, in) grid, in the order in which
torch stores it, so what flows into a neuron is a row of the grid and what flows back a column.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Int64
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

    @property
    def nodes(self) -> tuple[Int64[Tensor, "g r 1"], Int64[Tensor, "g 1 c"]]:
        """The row and the column of each edge."""
        groups, rows, columns = self.grid
        row, column = torch.arange(*self.rows), torch.arange(*self.columns)
        return row.view(groups, rows, 1), column.view(groups, 1, columns)


Chunk = tuple[KernelBlock, ...]  # kernels whose edges have their states in one tensor


@dataclass(frozen=True, eq=False)  # a topology is itself: hashed by identity
class Topology:
    """What stays the same from step to step: where everything lies. Built once for a NetSpec.

    Attributes:
        spec: The network.
        parameter_start: Where each parameter begins among all P scalars.
        node_start: Where each set of neurons begins among all N nodes.
        networks: Half-open range [start, stop) of the nodes of each network of a batch.
    """

    spec: NetSpec
    parameter_start: tuple[int, ...]
    node_start: tuple[int, ...]
    networks: tuple[tuple[int, int], ...]

    def sides(self, kernel: Kernel) -> tuple[int, int]:
        """The first node of a kernel's rows and of its columns."""
        source = self.node_start[kernel.source] + kernel.source_start
        target = self.node_start[kernel.target] + kernel.target_start
        return (source, target) if kernel.from_rows else (target, source)

    def first_scalar(self, of: Kernel | Bias) -> int:
        """The first scalar of a kernel or bias, which is no constant, among all P."""
        return self.parameter_start[of.parameter] + of.start

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


@lru_cache(maxsize=64)
def topology_of(spec: NetSpec) -> Topology:
    """The topology of a network; the second call for an equal network costs nothing."""
    nodes = [0, *itertools.accumulate(neurons.size for neurons in spec.neurons)]
    scalars = [0, *itertools.accumulate(math.prod(shape) for shape in spec.shapes)]
    network = [neurons.network for neurons in spec.neurons]
    first = [nodes[network.index(n)] for n in dict.fromkeys(network)]
    networks = tuple(itertools.pairwise([*first, nodes[-1]]))
    return Topology(spec, tuple(scalars[:-1]), tuple(nodes[:-1]), networks)
