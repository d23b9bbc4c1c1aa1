"""Kernels as blocks: grids of edges, which need no edge index.

Nodes are neurons and edges are pairs of neurons joined by a kernel. There is no n x n matrix: the
edges of a kernel [out, in, *positions] are the cells of its (out, in) grid, in torch's memory
layout. The edges into a neuron are a row of the grid, and those out of it a column.
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
    """Edges of a kernel: a grid for each of its groups.

    Attributes:
        kernel: Index of the kernel.
        grid: Number of groups, of rows and of columns of each.
        rows: Half-open range [start, stop) of the nodes of all rows.
        columns: Half-open range [start, stop) of the nodes of all columns.
        from_rows: Whether the rows are the nodes read.
    """

    kernel: int
    grid: tuple[int, int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    from_rows: bool

    @property
    def edges(self) -> int:
        """Number of edges."""
        return math.prod(self.grid)

    @property
    def ends(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Ranges of the nodes that edges lead to, and of those that they leave."""
        return (self.columns, self.rows) if self.from_rows else (self.rows, self.columns)

    @property
    def nodes(self) -> tuple[Int64[Tensor, "g r 1"], Int64[Tensor, "g 1 c"]]:
        """Nodes of the rows and of the columns, in the shape of the grid."""
        groups, rows, columns = self.grid
        row, column = torch.arange(*self.rows), torch.arange(*self.columns)
        return row.view(groups, rows, 1), column.view(groups, 1, columns)


Chunk = tuple[KernelBlock, ...]  # kernels whose edges have their states in one tensor


@dataclass(frozen=True, eq=False)  # a topology is itself: hashed by identity
class Topology:
    """Indices of the scalars and nodes of a network, computed once for a NetSpec.

    Attributes:
        spec: Specification of the network.
        parameter_start: Index of each parameter's first scalar among all P.
        node_start: Index of each set's first neuron among all N nodes.
        networks: Half-open range [start, stop) of the nodes of each network of a batch.
    """

    spec: NetSpec
    parameter_start: tuple[int, ...]
    node_start: tuple[int, ...]
    networks: tuple[tuple[int, int], ...]

    def sides(self, kernel: Kernel) -> tuple[int, int]:
        """Return the first node of a kernel's rows and of its columns."""
        source = self.node_start[kernel.source] + kernel.source_start
        target = self.node_start[kernel.target] + kernel.target_start
        return (source, target) if kernel.from_rows else (target, source)

    def first_scalar(self, of: Kernel | Bias) -> int:
        """Return the index of a kernel's or bias's first scalar among all P; not for constants."""
        return self.parameter_start[of.parameter] + of.start

    def bias(self, bias: Bias) -> tuple[int, int]:
        """Return the half-open range [start, stop) of the nodes of a bias."""
        start = self.node_start[bias.neurons] + bias.neurons_start
        return start, start + bias.size

    @cached_property
    def blocks(self) -> Chunk:
        """Blocks of all kernels."""
        blocks = []
        for k, kernel in enumerate(self.spec.kernels):
            groups, rows, columns = kernel.grid
            of_rows, of_columns = self.sides(kernel)
            ends = (of_rows, of_rows + groups * rows), (of_columns, of_columns + groups * columns)
            blocks.append(KernelBlock(k, kernel.grid, *ends, kernel.from_rows))
        return tuple(blocks)


@lru_cache(maxsize=64)
def topology_of(spec: NetSpec) -> Topology:
    """Compute the topology of a network, cached."""
    nodes = [0, *itertools.accumulate(neurons.size for neurons in spec.neurons)]
    scalars = [0, *itertools.accumulate(math.prod(shape) for shape in spec.shapes)]
    network = [neurons.network for neurons in spec.neurons]
    first = [nodes[network.index(n)] for n in dict.fromkeys(network)]
    networks = tuple(itertools.pairwise([*first, nodes[-1]]))
    return Topology(spec, tuple(scalars[:-1]), tuple(nodes[:-1]), networks)
