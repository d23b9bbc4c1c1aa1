"""Merges the partial aggregates of several blocks, one range of nodes at a time."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

G = TypeVar("G", bound="Partial")


@runtime_checkable
class Partial(Protocol):
    """Partial aggregate of n nodes that can be merged with more of the same."""

    def part(self: G, start: int, stop: int) -> G:
        """Slice of the nodes."""
        ...

    def merge(self: G, other: G) -> G:
        """Merge with another of the same nodes."""
        ...


@dataclass(frozen=True, slots=True)
class NodeRanges:
    """Partition of all nodes, ``nodes``, such that what reaches one node of a range reaches all.

    For each range that was asked for, ``reached`` has the ranges of the partition that it is made
    of, and where in it each begins and ends.
    """

    nodes: tuple[tuple[int, int], ...]
    reached: tuple[tuple[tuple[int, int, int], ...], ...]

    def merge_all(self, brought: Iterable[G], begin: Sequence[G | None]) -> list[G | None]:
        """Merge the partials of ranges, one after the other, into those that parts begin with."""
        held = list(begin)
        for within, each in zip(self.reached, brought, strict=True):
            for at, start, stop in within:
                part = each if len(within) == 1 else each.part(start, stop)
                known = held[at]
                held[at] = part if known is None else known.merge(part)
        return held

    def gathered(
        self, brought: Iterable[G], answer: Callable[[G], Tensor], nothing: Tensor
    ) -> Tensor:
        """Merge the partials of ranges; (*B, N, C) answers of all nodes, or of none, nothing."""
        reached = self.merge_all(brought, [None] * len(self.nodes))
        runs = [
            nothing[..., slice(*run), :] if partial is None else answer(partial)
            for run, partial in zip(self.nodes, reached, strict=True)
        ]
        return torch.cat(runs, dim=-2)


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
