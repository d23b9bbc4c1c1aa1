"""Edges of networks of any architectures in segments, so that all of them are one operation.

An edge that is walked both ways makes two directed edges, else one. What a kernel brings to one
node is a segment: a run of directed edges, as many as the kernel has columns, or on the way back
rows. Segments of one length lie together, whatever networks they are of, and are reduced as a
plain tensor (segments, length, H). What several kernels bring to a node is then put together.
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

# Kinds of segments, in the order in which they lie: walked against the edges or along, and whether
# they lead to nodes that are read.
BACKWARD, BACKWARD_READ, FORWARD_READ, FORWARD = range(4)
LONGEST = 1 << 32  # more than any length: a kind times this is what segments are sorted by first


@dataclass(frozen=True, slots=True)
class KernelTable:
    """Kernels of all networks of a batch, edges numbered in order.

    Of each, the numbers of groups, of rows and columns of a group, the nodes of the first row and
    column, and whether rows are what is read.
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
        runs: How many segments there are of each length, and the length.
        source: Node that each directed edge leaves.
        target: Node that each segment leads to.
        nodes: The nodes that gather.
        arrivals: Where segments lead, among ``nodes``.
    """

    runs: tuple[tuple[int, int], ...]
    source: Int64[Tensor, " D"]
    target: Int64[Tensor, " S"]
    nodes: Int64[Tensor, " n"]
    arrivals: Arrivals

    @property
    def lengths(self) -> Int64[Tensor, " S"]:
        """Directed edges in each segment."""
        counts, lengths = torch.tensor(self.runs, device=self.target.device).view(-1, 2).T
        return lengths.repeat_interleave(counts)

    def own(self, nodes: Float[Tensor, "N C"]) -> Float[Tensor, "n C"]:
        """Of all nodes those that gather."""
        return nodes if len(self.nodes) == len(nodes) else nodes[self.nodes]

    def grids(self, x: Float[Tensor, "D ..."]) -> list[Float[Tensor, "_ length ..."]]:
        """What directed edges hold, in a tensor for each length: views."""
        parts = x.split([count * length for count, length in self.runs])
        return [part.unflatten(0, run) for part, run in zip(parts, self.runs, strict=True)]

    def rows(self, x: Float[Tensor, "S ..."]) -> list[Float[Tensor, "_ 1 ..."]]:
        """What segments hold, to go with ``grids``."""
        return [part.unsqueeze(1) for part in x.split([count for count, _ in self.runs])]

    def spread(
        self, of_target: Float[Tensor, "N H"], of_source: Float[Tensor, "N H"]
    ) -> Iterator[Float[Tensor, "... H"]]:
        """A term of the node that a directed edge leads to plus a term of the one it leaves."""
        leaving = of_source.index_select(0, self.source)
        yield self.over(leaving, of_target.index_select(0, self.target))

    def over(
        self, x: Float[Tensor, "D ..."], of_segment: Float[Tensor, "S ..."]
    ) -> Float[Tensor, "D ..."]:
        """What directed edges hold plus a term of their segment."""
        pairs = zip(self.grids(x), self.rows(of_segment), strict=True)
        return torch.cat([(grid + row).flatten(0, 1) for grid, row in pairs])

    def tallied(
        self, messages: Iterable[Float[Tensor, "... H"]]
    ) -> tuple[Float[Tensor, "S two_H"], Float[Tensor, "S H"], Float[Tensor, "S H"]]:
        """Of each segment sums, sums of squares beside them, minima and maxima."""
        (each,) = messages
        # ``apply`` is declared to answer with one tensor, ``backward`` to take any number.
        return _Tallied.apply(each, self)  # type: ignore[misc]

    def sums(self, x: Float[Tensor, "D ..."]) -> Float[Tensor, "S ..."]:
        """The sum of each segment."""
        return torch.cat([grid.sum(1) for grid in self.grids(x)])


@dataclass(frozen=True, slots=True)
class DirectedEdges:
    """Directed edges of a batch, those against the direction of their edge, if any, first.

    Attributes:
        all: They and all nodes.
        last: Those that lead to nodes that are read, and these nodes.
        within: Where those lie among all.
        edge: Which edge each is.
        partner: Where the same edge is walked the other way; empty where none is.
        sizes: Nodes of each of I networks.
    """

    all: Segments
    last: Segments
    within: slice
    edge: Int64[Tensor, " D"]
    partner: Int64[Tensor, " D_or_0"]
    sizes: Int64[Tensor, " I"]

    def kept(self, edges: Sequence[Tensor]) -> list[Tensor]:
        """Of what is held for all directed edges that of the last ones."""
        return [each[self.within] for each in edges]

    def paired(
        self, edges: Sequence[Float[Tensor, "... C"]], last: bool
    ) -> list[Float[Tensor, "... two_C"]]:
        """The state of each directed edge, or of each of the last, and that of its reverse."""
        own = self.within if last else slice(None)
        partner = self.partner[own]
        return [torch.cat([each[own], each.index_select(0, partner)], dim=1) for each in edges]

    def sums(self, edges: Sequence[Float[Tensor, "D C"]]) -> Float[Tensor, "2 N C"]:
        """For each node the sum of the edges that lead to it, and of those that leave it."""
        (each,) = edges
        into, out_of = self.all.sums(each), self.all.sums(each.index_select(0, self.partner))
        return self.all.arrivals.added(torch.stack([into, out_of]))

    def mean(self, x: Float[Tensor, "N H"]) -> Float[Tensor, "N 1"]:
        """For each node the mean of all entries of its network's nodes."""
        network = torch.arange(len(self.sizes), device=x.device).repeat_interleave(self.sizes)
        sums = x.new_zeros(len(self.sizes)).index_add(0, network, x.mean(1))
        return (sums / self.sizes)[network, None]

    def unjoined(self, most_pairs: int) -> Pairs:
        """Pairs of nodes without an edge, of networks with few enough."""
        forward = slice(len(self.edge) // 2, None)  # of edges that are walked both ways
        target = self.all.target.repeat_interleave(self.all.lengths)[forward]
        source = self.all.source[forward]
        own = self.sizes.repeat_interleave(self.sizes)[target].square() <= most_pairs
        return unjoined_pairs(self.sizes, most_pairs, [(target[own], source[own])])


def directed_edges(
    grids: KernelTable, sizes: Int64[Tensor, " I"], read: Bool[Tensor, " N"], both: bool
) -> DirectedEdges:
    """Put all edges in segments, walked both ways or along their direction alone.

    ``sizes`` are the nodes of each network, ``read`` those whose last states are read; of a
    kernel's rows all or none, and of its columns.
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
    """Where each edge is walked the other way."""
    backward, forward = edge.chunk(2)  # all edges in two orders, which argsort turns round
    return torch.cat([forward.argsort()[backward] + len(backward), backward.argsort()[forward]])


def _sides(
    grids: KernelTable, read: Tensor
) -> tuple[Int64[Tensor, "sides 9"], Int64[Tensor, " sides"]]:
    """For the rows and for the columns of each kernel what they gather, sorted, and its kind."""
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

    Equal messages share a minimum's gradient evenly, as with ``torch.amin``.
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
