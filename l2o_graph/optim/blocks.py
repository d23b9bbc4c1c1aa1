"""Blocks: the matrices that a parameter consists of, and the neurons of their rows.

A linear or convolutional kernel is one matrix: a row for each neuron written, a column for each
value that it reads. A fused projection or a recurrent weight consists of several matrices. Tables
of embeddings, vectors and scalars are updated elementwise.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from torch import Tensor

from l2o_graph.layout.spec import Bias, Kernel, NetSpec

# Kinds of blocks, in the order of their indicators among the signals. A kernel is "first" if it
# reads inputs of the network, and "last" if it writes outputs.
Kind = Literal["first", "hidden", "last", "diagonal", "table", "vector"]
KINDS: tuple[Kind, ...] = ("first", "hidden", "last", "diagonal", "table", "vector")
MATRICES: tuple[Kind, ...] = ("first", "hidden", "last")

# A fused kernel is divided into at most MOST_PARTS parts of at least LEAST_PART rows.
MOST_PARTS, LEAST_PART = 8, 2


@dataclass(frozen=True, slots=True)
class Block:
    """A part of one parameter that is treated uniformly."""

    parameter: int  # index of the parameter
    kind: Kind  # role in the network
    start: int  # index of its first scalar in the flattened parameter
    stored: tuple[int, int, int, int]  # axes as stored: groups, rows, columns and positions
    transposed: bool = False  # whether the neurons written are columns instead of rows
    # Set of neurons that is read or written, and index of the first in it; None outside the graph.
    source: tuple[int, int] | None = None
    target: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.stored)

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Groups, rows and columns of the block as matrices, with neurons written as rows."""
        groups, rows, columns, positions = self.stored
        if self.transposed:
            rows, columns = columns, rows
        if self.kind == "diagonal":  # a row for the few scalars of each neuron
            return 1, groups * rows, columns * positions
        if self.kind in ("table", "vector"):  # all in one row
            return 1, 1, self.size
        return groups, rows, columns * positions

    def take(self, tensor: Tensor) -> Tensor:
        """Extract the block from a flattened parameter: (*B, size) -> (*B, *matrix)."""
        whole = tensor.shape[-1] == self.size
        x = tensor if whole else tensor[..., self.start : self.start + self.size]
        if self.transposed:
            x = x.unflatten(-1, self.stored).transpose(-3, -2)
        return x.reshape(*tensor.shape[:-1], *self.matrix)

    def put(self, matrices: Tensor) -> Tensor:
        """Flatten matrices to the order of the parameter: the inverse of ``take``."""
        lead = matrices.shape[:-3]
        groups, rows, columns, positions = self.stored
        if self.transposed:
            matrices = matrices.reshape(*lead, groups, columns, rows, positions).transpose(-3, -2)
        return matrices.reshape(*lead, self.size)


@lru_cache(maxsize=256)
def blocks_of(spec: NetSpec) -> tuple[Block, ...]:
    """Divide all parameters of a network into blocks; every scalar is in exactly one."""
    kernels: dict[int, list[Kernel]] = {}
    biases: dict[int, list[Bias]] = {}
    for bias in spec.biases:
        if not bias.again:
            biases.setdefault(bias.parameter, []).append(bias)
    for kernel in spec.kernels:
        if not kernel.again and not spec.is_constant(kernel.parameter):
            kernels.setdefault(kernel.parameter, []).append(kernel)
    answer: list[Block] = []
    for i, shape in enumerate(spec.shapes):
        if math.prod(shape) == 0:
            continue
        on = biases.get(i, [])
        if len(on) > 1 and sum(b.size for b in on) == math.prod(shape):  # of an ensemble
            answer += [Block(i, "vector", b.start, (1, 1, 1, b.size)) for b in on]
            continue
        found = sorted(kernels.get(i, []), key=lambda k: k.start)
        answer += _of_parameter(spec, i, shape, found)
    return tuple(answer)


def _of_parameter(
    spec: NetSpec, i: int, shape: tuple[int, ...], kernels: list[Kernel]
) -> list[Block]:
    size = math.prod(shape)
    if len(shape) < 2:
        return [Block(i, "vector", 0, (1, 1, 1, size))]
    if any(k.kind == "lookup" for k in kernels):
        return [Block(i, "table", 0, (1, 1, 1, size))]
    ends = [k.start + k.size for k in kernels]
    tiled = bool(kernels) and [0, *ends] == [*(k.start for k in kernels), size]
    if not tiled:  # no known place in the graph: torch's layers have outputs as first axis
        rows = shape[0]
        kind: Kind = "diagonal" if rows == size or 1 in (rows, size // rows) else "hidden"
        return [Block(i, kind, 0, (1, rows, size // rows, 1))]
    return [_of_kernel(spec, part) for k in kernels for part in _parts(spec, k)]


def _parts(spec: NetSpec, kernel: Kernel) -> list[Kernel]:
    """Divide a fused projection where other kernels divide the neurons that it writes.

    One weight may write queries, keys and values as one set of neurons, which others then read in
    three parts.
    """
    groups, rows, columns = kernel.grid
    if groups > 1 or kernel.from_rows:
        return [kernel]
    first = kernel.target_start
    cuts = {first, first + rows}
    for other in spec.kernels:
        if other.source == kernel.target:
            read = other.grid[0] * other.grid[1 if other.from_rows else 2]
            cuts |= {other.source_start, other.source_start + read}
    starts = sorted(cut - first for cut in cuts if first <= cut <= first + rows)
    sizes = [b - a for a, b in itertools.pairwise(starts)]
    if len(sizes) > MOST_PARTS or min(sizes) < LEAST_PART:
        return [kernel]
    return [
        replace(
            kernel,
            grid=(1, size, columns),
            start=kernel.start + start * kernel.row,
            target_start=first + start,
        )
        for start, size in zip(starts, sizes, strict=False)
    ]


def _of_kernel(spec: NetSpec, kernel: Kernel) -> Block:
    groups, rows, columns = kernel.grid
    positions = math.prod(kernel.positions)
    written, read = (columns, rows) if kernel.from_rows else (rows, columns)
    kind: Kind = "hidden"
    if (groups > 1 and written == 1) or (min(written, read * positions) == 1 and groups > 1):
        kind = "diagonal"
    elif spec.neurons[kernel.target].role == "output":
        kind = "last"
    elif spec.neurons[kernel.source].role == "input":
        kind = "first"
    return Block(
        kernel.parameter,
        kind,
        kernel.start,
        (groups, rows, columns, positions),
        kernel.from_rows,
        (kernel.source, kernel.source_start),
        (kernel.target, kernel.target_start),
    )
