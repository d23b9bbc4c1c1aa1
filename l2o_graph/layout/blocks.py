"""Kernels in blocks: rows of a kernel's grid, which need no index of their edges.

Nodes are neurons and edges are pairs of neurons joined by a kernel. Nothing is n x n: the edges
of a kernel [out, in, *positions] are the cells of its own (out, in) grid, in the order in which
torch stores it, so what flows into a neuron is a row of the grid and what flows back a column.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph.layout.spec import Bias, Kernel, NetSpec


@dataclass(frozen=True, slots=True)
class KernelBlock:
    """Some rows of a kernel's grid, all columns: the least that is worked on at once.

    Several rows of one group, or all rows of several groups.

    Attributes:
        kernel: Index of the kernel.
        parameter: Index of the parameter.
        start: First scalar of the flattened parameter.
        grid: Groups, rows of each and columns of each, of these rows alone.
        positions: Spatial shape of the kernel.
        rows: Half-open range [start, stop) of the nodes that the rows are.
        columns: The same for the columns.
        from_rows: Whether rows are what is read.
        again: Whether the scalars are updated by another kernel.
        share: Fraction of the rows of its groups that these are.
    """

    kernel: int
    parameter: int
    start: int
    grid: tuple[int, int, int]
    positions: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int]
    from_rows: bool
    again: bool
    share: float

    @property
    def edges(self) -> int:
        """Edges in all."""
        return math.prod(self.grid)

    @property
    def ends(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Nodes that the edges lead to, and nodes that they leave: one is rows, one columns."""
        return (self.columns, self.rows) if self.from_rows else (self.rows, self.columns)

    @property
    def stop(self) -> int:
        """Behind the last scalar."""
        return self.start + self.edges * math.prod(self.positions)


Chunk = tuple[KernelBlock, ...]


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

    def chunks(self, most: int) -> tuple[Chunk, ...]:
        """Divide the rows of all kernels into chunks of at most so many parameters.

        One row is the least a chunk holds. A network within the limit is a single chunk.
        """
        chunks: list[list[KernelBlock]] = [[]]
        room = most
        for k, kernel in enumerate(self.spec.kernels):
            groups, rows, _ = kernel.grid
            row, count = 0, groups * rows
            while row < count:
                fit = min(count - row, room // kernel.row)
                if fit <= 0 and chunks[-1]:  # below 0 after a row that alone exceeds the limit
                    chunks.append([])
                    room = most
                    continue
                block = self._block(k, row, max(fit, 1))
                chunks[-1].append(block)
                taken = block.grid[0] * block.grid[1]
                room -= taken * kernel.row
                row += taken
        return tuple(tuple(chunk) for chunk in chunks if chunk)

    def _block(self, k: int, row: int, most: int) -> KernelBlock:
        """At most so many rows, from a row on: whole groups, or rows of a single one."""
        kernel = self.spec.kernels[k]
        _, rows, columns = kernel.grid
        group, within = divmod(row, rows)
        groups = most // rows if within == 0 else 0
        grid = (groups, rows, columns) if groups else (1, min(most, rows - within), columns)
        of_rows, of_columns = self.sides(kernel)
        of_columns += group * columns
        return KernelBlock(
            kernel=k,
            parameter=kernel.parameter,
            start=kernel.start + row * kernel.row,
            grid=grid,
            positions=kernel.positions,
            rows=(of_rows + row, of_rows + row + grid[0] * grid[1]),
            columns=(of_columns, of_columns + grid[0] * columns),
            from_rows=kernel.from_rows,
            again=kernel.again,
            share=grid[1] / rows,
        )


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
    for kernel in spec.kernels:
        groups, rows, columns = kernel.grid
        of_rows, of_columns = topology.sides(kernel)
        rows_reached = slice(of_rows, of_rows + groups * rows)
        columns_reached = slice(of_columns, of_columns + groups * columns)
        degree[rows_reached] += columns
        degree[columns_reached] += rows
        if kernel.from_rows:
            in_degree[columns_reached] += rows
        else:
            in_degree[rows_reached] += columns
    return topology
