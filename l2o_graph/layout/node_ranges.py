"""Merges the partial aggregates of several blocks, one range of nodes at a time."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from l2o_graph.layout.blocks import Chunk, Topology

G = TypeVar("G", bound="Partial")


# From so many chunks on, what stays of each is kept apart from what goes.
MANY_CHUNKS = 8


@runtime_checkable
class Partial(Protocol):
    """Partial aggregate of n nodes, a dataclass, that can be merged with more of the same."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def part(self: G, start: int, stop: int) -> G:
        """Slice of the nodes."""
        ...

    def merge(self: G, other: G) -> G:
        """Merge with another of the same nodes."""
        ...


class Arena:
    """Preallocated arena for small tensors that outlive large ones; not differentiable.

    A small tensor lands where a large one was just freed, and the next large one no longer fits
    there: without the arena, a step on GPT-2 small takes three times the memory that it uses.

    Args:
        ranges: Half-open ranges [start, stop) of nodes, each of which has a place here.
    """

    def __init__(self, ranges: tuple[tuple[int, int], ...]):
        self._ranges = ranges
        self._free = torch.empty(0)
        self._kept: dict[int, dict[str, Tensor]] = {}

    def put(self, at: int, value: G) -> G:
        """Copy the partial of a range, in place of the one before."""
        tensors = {
            f.name: getattr(value, f.name)
            for f in dataclasses.fields(value)
            if isinstance(getattr(value, f.name), Tensor)
        }
        if at not in self._kept:
            self._kept[at] = {name: self._room(t, at) for name, t in tensors.items()}
        kept = self._kept[at]
        for name, t in tensors.items():
            kept[name].copy_(t)
        return dataclasses.replace(value, **kept)

    def _room(self, like: Tensor, at: int) -> Tensor:
        size, (start, stop) = like.numel(), self._ranges[at]
        if self._free.numel() < size or self._free.dtype != like.dtype:  # enough for all nodes
            self._free = like.new_empty(size // (stop - start) * self._ranges[-1][1])
        room, self._free = self._free[:size], self._free[size:]
        return room.view(like.shape)


@dataclass(frozen=True, slots=True)
class NodeRanges:
    """Partition of all nodes such that whatever reaches one node of a range reaches all of it.

    Attributes:
        nodes: Half-open ranges [start, stop) of the partition.
        reached: For each range that was asked for, the ranges of the partition that it is made
            of, and where in it each begins and ends.
    """

    nodes: tuple[tuple[int, int], ...]
    reached: tuple[tuple[tuple[int, int, int], ...], ...]

    def merge_all(
        self, brought: Iterable[G], begin: Sequence[G | None], chunks: int = 1
    ) -> list[G | None]:
        """Merge the partials of ranges, one after the other.

        Args:
            brought: Partial of each range.
            begin: Partial of each part before the first.
            chunks: Number of chunks that the ranges come from.
        """
        held, arena = list(begin), None
        if chunks >= MANY_CHUNKS and not torch.is_grad_enabled():
            arena = Arena(self.nodes)
        for within, each in zip(self.reached, brought, strict=True):
            for at, start, stop in within:
                part = each if len(within) == 1 else each.part(start, stop)
                known = held[at]
                both = part if known is None else known.merge(part)
                held[at] = both if arena is None else arena.put(at, both)
        return held


@lru_cache(maxsize=64)
def split_ranges(ranges: tuple[tuple[int, int], ...], nodes: int) -> NodeRanges:
    """Coarsest partition of the nodes that no range cuts."""
    cuts = sorted({0, nodes, *itertools.chain.from_iterable(ranges)})
    parts = tuple(itertools.pairwise(cuts))
    number = {start: i for i, (start, _) in enumerate(parts)}
    number[nodes] = len(parts)
    reached = tuple(
        tuple(
            (i, parts[i][0] - start, parts[i][1] - start)
            for i in range(number[start], number[stop])
        )
        for start, stop in ranges
    )
    return NodeRanges(parts, reached)


def split_chunks(topology: Topology, chunks: Sequence[Chunk]) -> NodeRanges:
    """Partition for the rows and the columns of each block, in turn."""
    ranges = tuple(side for chunk in chunks for p in chunk for side in (p.rows, p.columns))
    return split_ranges(ranges, topology.spec.num_nodes)
