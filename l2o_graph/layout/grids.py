"""Edges of networks of one architecture in grids, a kernel each, which need no index of edges.

States of edges lie in P planes: plane 0 is the forward edge source -> target, plane 1 its reverse,
where edges are walked both ways. Batch axes in front, written *B, are networks side by side. What
flows into a node is a row of a grid and what flows back a column: each is a segment.
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
    """Directed edges of some kernels, which lead to S segments, and all nodes, which gather.

    Attributes:
        chunks: Kernels; the states of a chunk's edges are one tensor.
        planes: Two where edges are walked both ways, else one.
        arrivals: Where segments lead: chunk by chunk, kernel by kernel, plane by plane.
    """

    chunks: tuple[Chunk, ...]
    planes: int
    arrivals: Arrivals

    def own(self, nodes: Float[Tensor, "*B N C"]) -> Float[Tensor, "*B N C"]:
        """Of all nodes those that gather."""
        return nodes

    def spread(
        self, of_target: Float[Tensor, "*B N H"], of_source: Float[Tensor, "*B N H"]
    ) -> Iterator[Float[Tensor, "... H"]]:
        """For each chunk a term of the node that a directed edge leads to plus one of the other."""
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
        """What directed edges hold, and the axis along which they lead to one node."""
        for block, own in self.blocks(x):
            planes = own.unflatten(-2, block.grid).unbind(-5)
            dims = (-3, -2) if block.from_rows else (-2, -3)
            yield from zip(planes, dims[: self.planes], strict=True)

    def blocks(
        self, x: Iterable[Float[Tensor, "... C"]]
    ) -> Iterator[tuple[KernelBlock, Float[Tensor, "... E C"]]]:
        """All kernels, and what their edges hold."""
        for chunk, each in zip(self.chunks, x, strict=True):
            yield from zip(chunk, each.split([block.edges for block in chunk], dim=-2), strict=True)

    def tallied(
        self, messages: Iterable[Float[Tensor, "... H"]]
    ) -> tuple[Float[Tensor, "*B S two_H"], Float[Tensor, "*B S H"], Float[Tensor, "*B S H"]]:
        """Of each segment sums, sums of squares beside them, minima and maxima."""
        found = []
        for grid, dim in self.grids(messages):
            sums = torch.cat([grid.sum(dim), grid.square().sum(dim)], dim=-1)
            # Not torch.aminmax: ten times slower on a CPU than one after the other.
            found.append([x.flatten(-3, -2) for x in (sums, grid.amin(dim), grid.amax(dim))])
        sums, low, high = (torch.cat(x, dim=-2) for x in zip(*found, strict=True))
        return sums, low, high


def over_edges(
    chunk: Chunk, of_target: Float[Tensor, "*B N H"], of_source: Float[Tensor, "*B N H"]
) -> list[Float[Tensor, "... H"]]:
    """For each kernel a term of the node an edge leads to plus a term of the node it leaves."""
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
    """All edges of a network, and those of the chunks that lead to nodes that are read.

    It offers what ``DirectedEdges`` does of networks of any architectures.
    """

    topology: Topology
    all: Grids
    last: Grids
    device: torch.device

    def kept(self, edges: Sequence[Tensor]) -> list[Tensor]:
        """Of what is held for all chunks that of the last ones."""
        of_chunk = dict(zip(self.all.chunks, edges, strict=True))
        return [of_chunk[chunk] for chunk in self.last.chunks]

    def paired(
        self, edges: Sequence[Float[Tensor, "... C"]], last: bool
    ) -> list[Float[Tensor, "... two_C"]]:
        """The state of each directed edge, or of each of the last, and that of its reverse."""
        own = self.kept(edges) if last else edges
        return [torch.cat([each, each.flip(-3)], dim=-1) for each in own]

    def sums(self, edges: Sequence[Float[Tensor, "... C"]]) -> Float[Tensor, "*B 2 N C"]:
        """For each node the sum of the edges that lead to it, and of those that leave it."""
        found = []
        for block, own in self.all.blocks(edges):
            grid = own.unflatten(-2, block.grid)  # (*B, 2, g, r, c, C)
            to, of = (-3, -2) if block.from_rows else (-2, -3)
            # Forward edges lead to targets and leave sources, reverse edges the other way round.
            found += [grid.sum(to).flatten(-3, -2), grid.sum(of).flatten(-3, -2).flip(-3)]
        return self.all.arrivals.added(torch.cat(found, dim=-2))

    def mean(self, x: Float[Tensor, "*B N H"]) -> Float[Tensor, "*B N 1"]:
        """For each node the mean of all entries of its network's nodes."""
        sizes = [stop - start for start, stop in self.topology.networks]
        means = [part.mean((-2, -1), keepdim=True) for part in x.split(sizes, dim=-2)]
        runs = zip(means, sizes, strict=True)
        return torch.cat([mean.expand(*x.shape[:-2], size, 1) for mean, size in runs], dim=-2)

    def unjoined(self, most_pairs: int) -> Pairs:
        """Pairs of nodes without an edge, of networks with few enough."""
        return _unjoined(self.topology, most_pairs, self.device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def grid_route(
    topology: Topology,
    device: torch.device,
    together: bool = False,
    both: bool = True,
    outputs: bool = False,
) -> GridRoute:
    """All of a network's edges; the second call costs nothing.

    Args:
        topology: The network.
        device: Where states are.
        together: Whether all kernels are one chunk, rather than each of its own: what no one asks
            for is then not worked out, and what one does not joined.
        both: Whether edges are walked both ways, or along the flow alone.
        outputs: Whether outputs alone are read in the end: the last round then needs no more than
            the chunks that lead to them, and other nodes have states that mean nothing.
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
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def _unjoined(topology: Topology, most_pairs: int, device: torch.device) -> Pairs:
    joined = []
    for block, kernel in zip(topology.blocks, topology.spec.kernels, strict=True):
        first, end = topology.networks[topology.spec.neurons[kernel.source].network]
        if (end - first) ** 2 <= most_pairs:
            row, column = block.nodes
            joined.append((row.to(device), column.to(device)))
    sizes = torch.tensor([end - first for first, end in topology.networks], device=device)
    return unjoined_pairs(sizes, most_pairs, joined)
