"""Edges of networks of any architectures as segments, to process a batch in few operations.

An edge with both directions gives two directed edges, else one. The directed edges from one kernel
into one node are a segment: as many as the kernel has columns, or rows in the reverse direction.
Segments of one length, of all networks, are adjacent and reduced as one tensor (segments, length,
H). Nodes then combine their segments.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from l2o_graph.layout.arrivals import Arrivals, arrivals_of, counted
from l2o_graph.layout.pairs import Pairs, unjoined_pairs

# Kinds of segments, in the order in which they are stored: against the edges or along them, and
# whether they lead to nodes that are read at the end.
BACKWARD, BACKWARD_READ, FORWARD_READ, FORWARD = range(4)
LONGEST = 1 << 32  # more than any length, so that kind * LONGEST + length sorts by kind first


@dataclass(frozen=True, slots=True)
class KernelTable:
    """Kernels of all networks of a batch, with edges numbered in order.

    For each kernel: the numbers of groups, of rows and of columns of a group, the nodes of the
    first row and column, and whether the rows are the nodes read.
    """

    groups: Int64[Tensor, " k"]
    rows: Int64[Tensor, " k"]
    columns: Int64[Tensor, " k"]
    row: Int64[Tensor, " k"]
    column: Int64[Tensor, " k"]
    from_rows: Bool[Tensor, " k"]


@dataclass(frozen=True, slots=True)
class Segments:
    """D directed edges in S segments that lead to n nodes.

    Attributes:
        runs: Number of segments of each length, and the length.
        source: Node that each directed edge leaves.
        target: Node that each segment leads to.
        nodes: Receiving nodes.
        arrivals: Nodes of the segments, as indices of ``nodes``.
    """

    runs: tuple[tuple[int, int], ...]
    source: Int64[Tensor, " D"]
    target: Int64[Tensor, " S"]
    nodes: Int64[Tensor, " n"]
    arrivals: Arrivals

    @property
    def lengths(self) -> Int64[Tensor, " S"]:
        """Number of directed edges in each segment."""
        counts, lengths = torch.tensor(self.runs, device=self.target.device).view(-1, 2).T
        return lengths.repeat_interleave(counts)

    def own(self, nodes: Float[Tensor, "N C"]) -> Float[Tensor, "n C"]:
        """Select the receiving nodes."""
        return nodes if len(self.nodes) == len(nodes) else nodes[self.nodes]

    def grids(self, x: Float[Tensor, "D ..."]) -> list[Float[Tensor, "_ length ..."]]:
        """View values of directed edges as a tensor for each length."""
        parts = x.split([count * length for count, length in self.runs])
        return [part.unflatten(0, run) for part, run in zip(parts, self.runs, strict=True)]

    def rows(self, x: Float[Tensor, "S ..."]) -> list[Float[Tensor, "_ 1 ..."]]:
        """View values of segments in shapes that broadcast with ``grids``."""
        return [part.unsqueeze(1) for part in x.split([count for count, _ in self.runs])]

    def spread(
        self, of_target: Float[Tensor, "N H"], of_source: Float[Tensor, "N H"]
    ) -> Iterator[Float[Tensor, "... H"]]:
        """Yield the sum of terms of the target and the source of directed edges."""
        leaving = of_source.index_select(0, self.source)
        yield self.over(leaving, of_target.index_select(0, self.target))

    def over(
        self, x: Float[Tensor, "D ..."], of_segment: Float[Tensor, "S ..."]
    ) -> Float[Tensor, "D ..."]:
        """Add a term of their segment to values of directed edges."""
        pairs = zip(self.grids(x), self.rows(of_segment), strict=True)
        return torch.cat([(grid + row).flatten(0, 1) for grid, row in pairs])

    def tallied(
        self, messages: Iterable[Float[Tensor, "... H"]]
    ) -> tuple[Float[Tensor, "S two_H"], Float[Tensor, "S H"], Float[Tensor, "S H"]]:
        """Compute sums and sums of squares, minima and maxima of each segment."""
        (each,) = messages
        # ``apply`` is declared to return one tensor, ``backward`` to take any number.
        return _Tallied.apply(each, self)  # type: ignore[misc]

    def sums(self, x: Float[Tensor, "D ..."]) -> Float[Tensor, "S ..."]:
        """Sum each segment."""
        return torch.cat([grid.sum(1) for grid in self.grids(x)])


@dataclass(frozen=True, slots=True)
class DirectedEdges:
    """Directed edges of a batch; reverse directions, if any, come first.

    Attributes:
        all: Segments of all directed edges, and all nodes.
        last: Segments that lead to nodes that are read at the end, and these nodes.
        within: Range of the directed edges of ``last`` among all.
        edge: Edge of each directed edge.
        partner: Index of the other direction of each; empty if there is only one direction.
        sizes: Number of nodes of each of I networks.
    """

    all: Segments
    last: Segments
    within: slice
    edge: Int64[Tensor, " D"]
    partner: Int64[Tensor, " D_or_0"]
    sizes: Int64[Tensor, " I"]

    def kept(self, edges: Sequence[Tensor]) -> list[Tensor]:
        """Select the values of the last directed edges from those of all."""
        return [each[self.within] for each in edges]

    def paired(
        self, edges: Sequence[Float[Tensor, "... C"]], last: bool
    ) -> list[Float[Tensor, "... two_C"]]:
        """Concatenate the states of each (or each last) directed edge and its reverse."""
        own = self.within if last else slice(None)
        partner = self.partner[own]
        return [torch.cat([each[own], each.index_select(0, partner)], dim=1) for each in edges]

    def sums(self, edges: Sequence[Float[Tensor, "D C"]]) -> Float[Tensor, "2 N C"]:
        """Sum for each node the edges that lead to it, and those that leave it."""
        (each,) = edges
        into, out_of = self.all.sums(each), self.all.sums(each.index_select(0, self.partner))
        return self.all.arrivals.added(torch.stack([into, out_of]))

    def mean(self, x: Float[Tensor, "N H"]) -> Float[Tensor, "N 1"]:
        """Compute for each node the mean over all entries of its network's nodes."""
        network = torch.arange(len(self.sizes), device=x.device).repeat_interleave(self.sizes)
        sums = x.new_zeros(len(self.sizes)).index_add(0, network, x.mean(1))
        return (sums / self.sizes)[network, None]

    def unjoined(self, most_pairs: int) -> Pairs:
        """Return the pairs of nodes without an edge, of networks that are small enough."""
        forward = slice(len(self.edge) // 2, None)  # edges have both directions here
        target = self.all.target.repeat_interleave(self.all.lengths)[forward]
        source = self.all.source[forward]
        own = self.sizes.repeat_interleave(self.sizes)[target].square() <= most_pairs
        return unjoined_pairs(self.sizes, most_pairs, [(target[own], source[own])])


def directed_edges(
    grids: KernelTable, sizes: Int64[Tensor, " I"], read: Bool[Tensor, " N"], both: bool
) -> DirectedEdges:
    """Arrange all edges in segments, in both directions or only forward.

    ``sizes`` are the numbers of nodes of each network. ``read`` marks nodes whose final states are
    read: all or none of a kernel's rows, and of its columns.
    """
    sides, leads = _sides(grids, read)
    if not both:
        sides, leads = sides[leads >= FORWARD_READ], leads[leads >= FORWARD_READ]
    groups, mine, theirs, my_node, their_node, my_stride, their_stride, first, _ = sides.T
    side, number = counted(groups * mine)
    group = number // mine[side]
    target = my_node[side] + number
    length = theirs[side]
    segment, step = counted(length)
    source = (their_node[side] + group * length)[segment] + step
    before = group * mine[side]
    start = first[side] + before * length + (number - before) * my_stride[side]
    edge = start[segment] + step * their_stride[side][segment]
    partner = _partner(edge) if both else edge.new_empty(0)

    kinds, index = torch.unique_consecutive(leads * LONGEST + theirs, return_inverse=True)
    counts = torch.zeros_like(kinds).index_add_(0, index, groups * mine).tolist()
    runs = list(zip(counts, (kinds % LONGEST).tolist(), strict=True))
    kind = (kinds // LONGEST).tolist()
    begin, end = bisect_left(kind, BACKWARD_READ), bisect_right(kind, FORWARD_READ)
    segments = slice(sum(n for n, _ in runs[:begin]), sum(n for n, _ in runs[:end]))
    kept = slice(sum(map(math.prod, runs[:begin])), sum(map(math.prod, runs[:end])))
    everyone = torch.arange(len(read), device=read.device)
    return DirectedEdges(
        _segments(runs, source, target, length, everyone),
        _segments(
            runs[begin:end], source[kept], target[segments], length[segments], everyone[read]
        ),
        kept,
        edge,
        partner,
        sizes,
    )


def _partner(edge: Int64[Tensor, " D"]) -> Int64[Tensor, " D"]:
    """Find the index of the other direction of each directed edge."""
    backward, forward = edge.chunk(2)  # all edges in two orders, which argsort inverts
    return torch.cat([forward.argsort()[backward] + len(backward), backward.argsort()[forward]])


def _sides(
    grids: KernelTable, read: Tensor
) -> tuple[Int64[Tensor, "sides 9"], Int64[Tensor, " sides"]]:
    """Describe the segments of the rows and columns of each kernel, sorted by kind and length."""
    g, zero = grids, torch.zeros_like(grids.rows)
    count = g.groups * g.rows * g.columns
    first, one, reads = count.cumsum(0) - count, zero + 1, g.from_rows.long()
    of_rows = [g.groups, g.rows, g.columns, g.row, g.column, g.columns, one, first, reads]
    of_columns = [g.groups, g.columns, g.rows, g.column, g.row, one, g.columns, first, 1 - reads]
    sides = torch.cat([torch.stack(of_rows, 1), torch.stack(of_columns, 1)])
    backward, is_read = sides[:, 8] > 0, read[sides[:, 3]]
    kind = torch.where(
        backward,
        torch.where(is_read, BACKWARD_READ, BACKWARD),
        torch.where(is_read, FORWARD_READ, FORWARD),
    )
    order = (kind * LONGEST + sides[:, 2]).argsort(stable=True)
    return sides[order], kind[order]


def _segments(
    runs: Sequence[tuple[int, int]], source: Tensor, target: Tensor, length: Tensor, nodes: Tensor
) -> Segments:
    arrivals = arrivals_of(torch.searchsorted(nodes, target), length, len(nodes))
    return Segments(tuple(runs), source, target, nodes, arrivals)


class _Tallied(torch.autograd.Function):
    """Sums, sums of squares, minima and maxima of segments.

    Equal messages share the gradient of a minimum evenly, as in ``torch.amin``.
    """

    @staticmethod
    def forward(ctx: Any, messages: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        size = messages.shape[1]
        sums = messages.new_empty(len(segments.target), 2 * size)
        low, high = (messages.new_empty(len(sums), size) for _ in range(2))
        at = 0
        for grid in segments.grids(messages):
            own = slice(at, at + len(grid))
            at = own.stop
            torch.sum(grid, 1, out=sums[own, :size])
            torch.sum(grid.square(), 1, out=sums[own, size:])
            torch.amin(grid, 1, out=low[own])
            torch.amax(grid, 1, out=high[own])
        ctx.segments = segments
        ctx.save_for_backward(messages, low, high)
        return sums, low, high

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, of_sums: Tensor, of_low: Tensor, of_high: Tensor
    ) -> tuple[Tensor, None]:
        segments: Segments = ctx.segments
        messages, low, high = ctx.saved_tensors
        of_total, of_squares = of_sums.chunk(2, dim=1)
        answer = torch.empty_like(messages)
        rows = [segments.rows(x) for x in (of_total, 2 * of_squares, low, of_low, high, of_high)]
        each = zip(segments.grids(messages), segments.grids(answer), *rows, strict=True)
        for grid, out, total, squares, least, to_least, most, to_most in each:
            torch.addcmul(total, squares, grid, out=out)
            for extreme, share in ((least, to_least), (most, to_most)):
                torch.eq(grid, extreme, out=(reached := torch.empty_like(grid)))
                out.addcmul_(reached, share / reached.sum(1, keepdim=True))
        return answer, None
