"""Edges of networks of one architecture as grids, one for each kernel, without an edge index.

States of edges have P planes: plane 0 is the forward edge source -> target, plane 1 its reverse, if
edges have both directions. Leading batch axes, written *B, are networks of one architecture. A row
of a grid leads into one node, a column back into another: each is a segment.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph.layout.arrivals import Arrivals, arrivals_of
from l2o_graph.layout.blocks import Chunk, KernelBlock, Topology
from l2o_graph.layout.pairs import Pairs, unjoined_pairs


@dataclass(frozen=True, eq=False)
class Grids:
    """Directed edges of some kernels, in S segments; all nodes receive.

    Attributes:
        chunks: Chunks of kernels; the states of a chunk's edges are one tensor.
        planes: Number of directions of edges, 1 or 2.
        arrivals: Nodes of the segments, ordered by chunk, kernel and plane.
    """

    chunks: tuple[Chunk, ...]
    planes: int
    arrivals: Arrivals

    def own(self, nodes: Float[Tensor, "*B N C"]) -> Float[Tensor, "*B N C"]:
        """Select the receiving nodes, here all."""
        return nodes

    def spread(
        self, of_target: Float[Tensor, "*B N H"], of_source: Float[Tensor, "*B N H"]
    ) -> Iterator[Float[Tensor, "... H"]]:
        """Yield for each chunk the sum of terms of the target and the source of directed edges."""
        # A forward edge leads to its target, and its reverse to the source.
        forward, reverse = (of_target, of_source), (of_source, of_target)
        ends = zip(forward, reverse, strict=True)
        to, of = (torch.stack(terms[: self.planes], dim=-3) for terms in ends)
        for chunk in self.chunks:
            pieces = over_edges(chunk, to, of)
            yield pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-2)

    def grids(
        self, x: Iterable[Float[Tensor, "... C"]]
    ) -> Iterator[tuple[Float[Tensor, "... g r c C"], int]]:
        """Yield values of directed edges as grids, and the axis along which they share a target."""
        for block, own in self.blocks(x):
            planes = own.unflatten(-2, block.grid).unbind(-5)
            dims = (-3, -2) if block.from_rows else (-2, -3)
            yield from zip(planes, dims[: self.planes], strict=True)

    def blocks(
        self, x: Iterable[Float[Tensor, "... C"]]
    ) -> Iterator[tuple[KernelBlock, Float[Tensor, "... E C"]]]:
        """Yield all kernels with the values of their edges."""
        for chunk, each in zip(self.chunks, x, strict=True):
            yield from zip(chunk, each.split([block.edges for block in chunk], dim=-2), strict=True)

    def tallied(
        self, messages: Iterable[Float[Tensor, "... H"]]
    ) -> tuple[Float[Tensor, "*B S two_H"], Float[Tensor, "*B S H"], Float[Tensor, "*B S H"]]:
        """Compute sums and sums of squares, minima and maxima of each segment."""
        found = []
        for grid, dim in self.grids(messages):
            sums = torch.cat([grid.sum(dim), grid.square().sum(dim)], dim=-1)
            # torch.aminmax is ten times slower on a CPU than amin and amax.
            found.append([x.flatten(-3, -2) for x in (sums, grid.amin(dim), grid.amax(dim))])
        sums, low, high = (torch.cat(x, dim=-2) for x in zip(*found, strict=True))
        return sums, low, high


def over_edges(
    chunk: Chunk, of_target: Float[Tensor, "*B N H"], of_source: Float[Tensor, "*B N H"]
) -> list[Float[Tensor, "... H"]]:
    """Compute for each kernel the sum of terms of the target and the source of its edges."""
    answer = []
    for block in chunk:
        groups, rows, columns = block.grid
        terms = (of_source, of_target) if block.from_rows else (of_target, of_source)
        of_rows = terms[0][..., slice(*block.rows), :].unflatten(-2, (groups, rows, 1))
        of_columns = terms[1][..., slice(*block.columns), :].unflatten(-2, (groups, 1, columns))
        answer.append((of_rows + of_columns).flatten(-4, -2))
    return answer


@dataclass(frozen=True, eq=False)
class GridRoute:
    """All edges of a network, and those of the chunks that lead to nodes read at the end.

    It has the same interface as ``DirectedEdges``, which is for any architectures.
    """

    topology: Topology
    all: Grids
    last: Grids
    device: torch.device

    def kept(self, edges: Sequence[Tensor]) -> list[Tensor]:
        """Select the values of the last chunks from those of all."""
        of_chunk = dict(zip(self.all.chunks, edges, strict=True))
        return [of_chunk[chunk] for chunk in self.last.chunks]

    def paired(
        self, edges: Sequence[Float[Tensor, "... C"]], last: bool
    ) -> list[Float[Tensor, "... two_C"]]:
        """Concatenate the states of each (or each last) directed edge and its reverse."""
        own = self.kept(edges) if last else edges
        return [torch.cat([each, each.flip(-3)], dim=-1) for each in own]

    def sums(self, edges: Sequence[Float[Tensor, "... C"]]) -> Float[Tensor, "*B 2 N C"]:
        """Sum for each node the edges that lead to it, and those that leave it."""
        found = []
        for block, own in self.all.blocks(edges):
            grid = own.unflatten(-2, block.grid)  # (*B, 2, g, r, c, C)
            to, of = (-3, -2) if block.from_rows else (-2, -3)
            # Forward edges lead to targets and leave sources, reverse edges the other way round.
            found += [grid.sum(to).flatten(-3, -2), grid.sum(of).flatten(-3, -2).flip(-3)]
        return self.all.arrivals.added(torch.cat(found, dim=-2))

    def mean(self, x: Float[Tensor, "*B N H"]) -> Float[Tensor, "*B N 1"]:
        """Compute for each node the mean over all entries of its network's nodes."""
        sizes = [stop - start for start, stop in self.topology.networks]
        means = [part.mean((-2, -1), keepdim=True) for part in x.split(sizes, dim=-2)]
        runs = zip(means, sizes, strict=True)
        return torch.cat([mean.expand(*x.shape[:-2], size, 1) for mean, size in runs], dim=-2)

    def unjoined(self, most_pairs: int) -> Pairs:
        """Return the pairs of nodes without an edge, of networks that are small enough."""
        return _unjoined(self.topology, most_pairs, self.device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached tensors may be needed in a backward pass
def grid_route(
    topology: Topology,
    device: torch.device,
    together: bool = False,
    both: bool = True,
    outputs: bool = False,
) -> GridRoute:
    """Lay out all edges of a network, cached.

    Args:
        topology: Topology of the network.
        device: Device of the states.
        together: Whether all kernels are one chunk instead of one chunk each. Separate chunks
            avoid unneeded computation in the last layer and concatenations.
        both: Whether edges have both directions, or only that of the flow.
        outputs: Whether only outputs are read at the end. The last layer then only needs the
            chunks that lead to them, and the states of other nodes are meaningless.
    """
    chunks = (topology.blocks,) if together else tuple((block,) for block in topology.blocks)
    spec, last = topology.spec, chunks
    if outputs:
        role = [spec.neurons[kernel.target].role for kernel in spec.kernels]
        last = tuple(c for c in chunks if any(role[block.kernel] == "output" for block in c))
    every, some = (_grids(spec.num_nodes, each, both, device) for each in (chunks, last))
    return GridRoute(topology, every, some, device)


def _grids(nodes: int, chunks: tuple[Chunk, ...], both: bool, device: torch.device) -> Grids:
    planes, to, lengths = 2 if both else 1, [], []
    for block in itertools.chain(*chunks):
        _, rows, columns = block.grid
        per_side = (rows, columns) if block.from_rows else (columns, rows)
        for (start, stop), length in zip(block.ends[:planes], per_side[:planes], strict=True):
            to.append(torch.arange(start, stop, device=device))
            lengths.append(torch.full((stop - start,), length, device=device))
    return Grids(chunks, planes, arrivals_of(torch.cat(to), torch.cat(lengths), nodes))


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # cached tensors may be needed in a backward pass
def _unjoined(topology: Topology, most_pairs: int, device: torch.device) -> Pairs:
    joined = []
    for block, kernel in zip(topology.blocks, topology.spec.kernels, strict=True):
        first, end = topology.networks[topology.spec.neurons[kernel.source].network]
        if (end - first) ** 2 <= most_pairs:
            row, column = block.nodes
            joined.append((row.to(device), column.to(device)))
    sizes = torch.tensor([end - first for first, end in topology.networks], device=device)
    return unjoined_pairs(sizes, most_pairs, joined)
