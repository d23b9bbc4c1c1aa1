"""NetSpec -> blocks: what of each parameter is one matrix, and which neurons its rows are.

A linear or convolutional kernel is a matrix of written neurons by what each of them reads. A fused
projection or a recurrent weight holds several; a table of embeddings, a vector and a scalar hold
none and are taken entry by entry.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from torch import Tensor

from l2o_graph.layout.spec import Bias, Kernel, NetSpec

# Kinds of blocks, in the order of their indicator among the inputs of the controller. A kernel is
# first where it reads inputs of the network and last where it writes outputs.
Kind = Literal["first", "hidden", "last", "diagonal", "table", "vector"]
KINDS: tuple[Kind, ...] = ("first", "hidden", "last", "diagonal", "table", "vector")
MATRICES: tuple[Kind, ...] = ("first", "hidden", "last")

# A fused kernel is divided into at most so many parts of at least so many rows.
MOST_PARTS, LEAST_PART = 8, 2


@dataclass(frozen=True, slots=True)
class Block:
    """Scalars of one parameter that are treated alike."""

    parameter: int  # index of it
    kind: Kind  # what they are to the network
    start: int  # position of the first of them in the flattened parameter
    stored: tuple[int, int, int, int]  # axes as stored: groups, rows, columns and positions
    transposed: bool = False  # whether columns rather than rows are the neurons written
    # Set of neurons read, or written, and the first of them in it; None outside the graph.
    source: tuple[int, int] | None = None
    target: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.stored)

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Groups, rows and columns of the block as matrices, rows being neurons written."""
        groups, rows, columns, positions = self.stored
        if self.transposed:
            rows, columns = columns, rows
        if self.kind == "diagonal":  # each neuron has its own few scalars: the neurons are rows
            return 1, groups * rows, columns * positions
        if self.kind in ("table", "vector"):  # no neuron of theirs has a state of its own
            return 1, 1, self.size
        return groups, rows, columns * positions

    def take(self, tensor: Tensor) -> Tensor:
        """View or copy the block of a flattened parameter: (*B, size) -> (*B, *matrix)."""
        whole = tensor.shape[-1] == self.size
        x = tensor if whole else tensor[..., self.start : self.start + self.size]
        if self.transposed:
            x = x.unflatten(-1, self.stored).transpose(-3, -2)
        return x.reshape(*tensor.shape[:-1], *self.matrix)

    def put(self, matrices: Tensor) -> Tensor:
        """Lay matrices out as the parameter stores them: the inverse of ``take``, flattened."""
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
        if len(on) > 1 and sum(b.size for b in on) == math.prod(shape):  # of members side by side
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
    if not tiled:  # its place is not known: rows are what torch's layers write
        rows = shape[0]
        kind: Kind = "diagonal" if rows == size or 1 in (rows, size // rows) else "hidden"
        return [Block(i, kind, 0, (1, rows, size // rows, 1))]
    return [_of_kernel(spec, part) for k in kernels for part in _parts(spec, k)]


def _parts(spec: NetSpec, kernel: Kernel) -> list[Kernel]:
    """Divide a kernel between neurons that the network tells apart: fused projections.

    Queries, keys and values of one weight are a set of neurons that others read in three runs.
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
