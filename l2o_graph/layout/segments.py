"""Edges of networks of any architectures in segments, so that all of them are one operation.

An edge that is walked both ways makes two directed edges, else one. What a kernel brings to one
node is a segment: a run of directed edges, as many as the kernel has columns, or on the way back
rows. Segments of one length lie together, whatever networks they are of, and are reduced as a
plain tensor (segments, length, H). What several kernels bring to a node is then put together.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from l2o_graph.layout.partials import PNAPartial

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
        to: The same as ``target``, as an index among ``nodes``.
        place: For each of ``nodes`` its segments, filled up with S.
        degree: Directed edges that lead to each of ``nodes``.
    """

    runs: tuple[tuple[int, int], ...]
    source: Int64[Tensor, " D"]
    target: Int64[Tensor, " S"]
    nodes: Int64[Tensor, " n"]
    to: Int64[Tensor, " S"]
    place: Int64[Tensor, "n most"]
    degree: Float[Tensor, " n"]

    @property
    def lengths(self) -> Int64[Tensor, " S"]:
        """Directed edges in each segment."""
        counts, lengths = torch.tensor(self.runs, device=self.to.device).view(-1, 2).T
        return lengths.repeat_interleave(counts)

    def grids(self, x: Float[Tensor, "D ..."]) -> list[Float[Tensor, "_ length ..."]]:
        """What directed edges hold, in a tensor for each length: views."""
        parts = x.split([count * length for count, length in self.runs])
        return [part.unflatten(0, run) for part, run in zip(parts, self.runs, strict=True)]

    def rows(self, x: Float[Tensor, "S ..."]) -> list[Float[Tensor, "_ 1 ..."]]:
        """What segments hold, to go with ``grids``."""
        return [part.unsqueeze(1) for part in x.split([count for count, _ in self.runs])]

    def spread(
        self, of_target: Float[Tensor, "N H"], of_source: Float[Tensor, "N H"]
    ) -> Float[Tensor, "D H"]:
        """A term of the node that a directed edge leads to plus a term of the one it leaves."""
        leaving = of_source.index_select(0, self.source)
        return self.over(leaving, of_target.index_select(0, self.target))

    def over(
        self, x: Float[Tensor, "D ..."], of_segment: Float[Tensor, "S ..."]
    ) -> Float[Tensor, "D ..."]:
        """What directed edges hold plus a term of their segment."""
        pairs = zip(self.grids(x), self.rows(of_segment), strict=True)
        return torch.cat([(grid + row).flatten(0, 1) for grid, row in pairs])

    def partial(self, messages: Float[Tensor, "D H"]) -> PNAPartial:
        """What each of ``nodes`` keeps of its messages; of none, zeros."""
        # ``apply`` is declared to answer with one tensor, ``backward`` to take any number.
        sums, low, high = _Tallied.apply(messages, self)  # type: ignore[misc]
        alone = (self.degree == 0)[:, None]
        return PNAPartial(
            self.degree.clamp(min=1)[:, None],
            self.added(sums),
            self._placed(low, math.inf).amin(1).masked_fill(alone, 0),
            self._placed(high, -math.inf).amax(1).masked_fill(alone, 0),
        )

    def summed(self, x: Float[Tensor, "D ..."]) -> Float[Tensor, "n ..."]:
        """The sum for each of ``nodes``."""
        return self.added(torch.cat([grid.sum(1) for grid in self.grids(x)]))

    def largest(self, x: Float[Tensor, "D ..."]) -> Float[Tensor, "n ..."]:
        """The largest for each of ``nodes``; of none, the smallest there is."""
        top = torch.cat([grid.amax(1) for grid in self.grids(x)])
        return self._placed(top, -math.inf).amax(1)

    def added(self, x: Float[Tensor, "S ..."]) -> Float[Tensor, "n ..."]:
        """The sum of what segments hold, for each of ``nodes``."""
        return x.new_zeros(len(self.nodes), *x.shape[1:]).index_add(0, self.to, x)

    def _placed(self, x: Float[Tensor, "S ..."], nothing: float) -> Float[Tensor, "n most ..."]:
        return torch.cat([x, x.new_full((1, *x.shape[1:]), nothing)])[self.place]


@dataclass(frozen=True, slots=True)
class DirectedEdges:
    """Directed edges of a batch, those against the direction of their edge, if any, first.

    Attributes:
        all: They and all nodes.
        last: Those that lead to nodes that are read, and these nodes.
        kept: Where those lie among all.
        edge: Which edge each is.
        partner: Where the same edge is walked the other way; empty where none is.
    """

    all: Segments
    last: Segments
    kept: slice
    edge: Int64[Tensor, " D"]
    partner: Int64[Tensor, " D_or_0"]


def counted(counts: Int64[Tensor, " k"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """For so many things of each of k owners: whose each thing is, and its number there."""
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - first[owner]


def directed_edges(grids: KernelTable, read: Bool[Tensor, " N"], both: bool) -> DirectedEdges:
    """Put all edges in segments, walked both ways or along their direction alone.

    ``read`` are the nodes whose last states are read; of a kernel's rows all or none, and of its
    columns.
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
    )


def _partner(edge: Int64[Tensor, " D"]) -> Int64[Tensor, " D"]:
    """Where each edge is walked the other way."""
    # Both directions of an edge are numbered alike: what is sorted first is the reverse.
    backward, forward = edge.chunk(2)
    half = len(backward)
    where = torch.empty(2, half, dtype=torch.long, device=edge.device)
    where[0, backward] = torch.arange(half, device=edge.device)
    where[1, forward] = torch.arange(half, 2 * half, device=edge.device)
    return torch.cat([where[1, backward], where[0, forward]])


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
    to = torch.searchsorted(nodes, target)
    segments = torch.bincount(to, minlength=len(nodes))
    node, slot = counted(segments)
    most = int(segments.max()) if len(target) else 0
    place = torch.full((len(nodes), most + 1), len(target), device=to.device)
    place[node, slot] = to.argsort(stable=True)
    degree = torch.zeros(len(nodes), device=to.device).index_add_(0, to, length.float())
    return Segments(tuple(runs), source, target, nodes, to, place, degree)


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
