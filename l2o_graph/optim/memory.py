"""The state of the rule: blocks of equal geometry and age, stacked to be processed together.

Tensors of a stack have axes N (sets of weights), M (matrices: blocks, times their groups), r rows
and c columns; B is N and M in one. The part of a block is a view of them, which an optimizer
keeps and saves.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from l2o_graph.layout.spec import NetSpec
from l2o_graph.optim.blocks import KINDS, MATRICES, Block, Kind
from l2o_graph.optim.signals import (
    COSINE_DECAYS,
    COSINE_UNITS,
    FAST,
    KIND_UNIT,
    LOG_LENGTH,
    LONG_PART,
    NUM_OF_ROW,
    NUM_OF_TENSOR,
    RATIOS,
    SLOW,
    Constants,
    History,
)
from l2o_graph.optim.whitening import Side, sides

# Units of lengths for layers with torch's own initialisation: of kernels relative to
# 1 / sqrt(fan-in), of everything else absolute.
KERNEL_STEP, VECTOR_STEP = 0.025, 0.005
# Units relative to the RMS of the weights. Weights of vectors are no measure: most start as 0 or 1.
RELATIVE_UNITS: dict[Kind, float] = {
    **dict.fromkeys(MATRICES, 3**0.5 * KERNEL_STEP),
    "diagonal": 0.05,
    "table": 0.025,
    "vector": 0.0,
}
# Blocks whose weights decay. Tables, of which a step uses only some rows, decay only if examples
# are few; vectors never do.
DECAYING: tuple[Kind, ...] = (*MATRICES, "diagonal")
DECAYING_ON_FEW: tuple[Kind, ...] = (*DECAYING, "table")

# The momenta of a stack: fast and slow average of the gradient, and the last update.
NUM_MOMENTA, LAST_UPDATE = 3, 2


@dataclass(eq=False)
class Stack:
    """Blocks that are processed together.

    Matrices of all sets form one batch in products: B = N M.

    Attributes:
        blocks: The blocks, in order.
        age: Number of steps before this one.
        sets: Number of sets of weights, N.
        shape: Number of matrices of a set, of rows and of columns, (M, r, c).
        sides: Whitening of the left and the right side; None for no whitening.
        rows: Half-open range [start, stop) of its rows among those of the memory.
        tensors: Half-open range of its matrices.
        first: Index of the first matrix of this geometry and age, possibly on another rank; it
            determines in which steps powers are recomputed.
        before: Number of matrices of this geometry and age in front of this stack.
        momenta: (3, B, r, c): fast and slow average of the gradient, last update.
        square: (B, r, c) average of the gradient's squares; only if no side is whitened.
        mean: (B, 1, 1) 1 / sqrt(number of scalars) of each matrix.
        grams: (B, k, s, s) averages of G G' and G' G; None for a side that is not whitened.
        roots: Powers of the averages, in the same form.
    """

    blocks: tuple[Block, ...]
    age: int
    sets: int
    shape: tuple[int, int, int]
    sides: tuple[Side | None, Side | None]
    rows: tuple[int, int]
    tensors: tuple[int, int]
    first: int
    before: int
    momenta: Tensor
    square: Tensor | None
    mean: Tensor
    grams: tuple[Tensor | None, Tensor | None]
    roots: tuple[Tensor | None, Tensor | None]

    def __post_init__(self):
        # Created once: on small networks a view costs as much as a product.
        self.averages = self.momenta[:LAST_UPDATE]
        self.fast, self.slow, self.last = self.momenta.unbind()
        self.runs = joined(self.blocks)

    @property
    def is_matrix(self) -> bool:
        """Whether its blocks are kernels, which join neurons."""
        return self.blocks[0].kind in MATRICES

    def decays(self, on_few: bool) -> bool:
        """Whether any of its blocks has weight decay: short ones of all kinds share a stack."""
        kinds = DECAYING_ON_FEW if on_few else DECAYING
        return any(block.kind in kinds for block in self.blocks)

    def owned(self) -> dict[str, Tensor]:
        """Return the tensors that are divided among matrices: (3, N, M, r, c), (N, M, ...)."""
        found = {"square": self.square}
        for name, gram, power in zip(("left", "right"), self.grams, self.roots, strict=True):
            found |= {f"{name}_gram": gram, f"{name}_root": power}
        sets = (self.sets, -1)
        answer = {name: t.unflatten(0, sets) for name, t in found.items() if t is not None}
        return {"momenta": self.momenta.unflatten(1, sets), **answer}


@dataclass(eq=False)
class Memory:
    """Whole state of the rule for a network in training.

    Attributes:
        stacks: Stacks of the blocks that this rank owns. Rows and matrices are numbered
            consecutively through these and those of other ranks.
        history: State of the signals, for all blocks.
        constants: Constants of all blocks.
        nodes: Nodes that messages travel between; None without a graph.
        elsewhere: Stacks owned by other ranks, on the meta device.
        summed: Function that adds a tensor up over all ranks, in place; None for a single process.
    """

    stacks: tuple[Stack, ...]
    history: History
    constants: Constants
    nodes: "Nodes | None" = None
    elsewhere: tuple[Stack, ...] = ()
    summed: Callable[[Tensor], Tensor] | None = None

    @property
    def all_stacks(self) -> tuple[Stack, ...]:
        """Stacks of this rank and of all others."""
        return self.stacks + self.elsewhere

    def laid(self, parts: Sequence[Tensor], axis: str, shape: tuple[int, ...]) -> Tensor:
        """Concatenate tensors of all stacks, with 0 for those of other ranks.

        Args:
            parts: Tensor of each stack here.
            axis: Axis to concatenate, "rows" or "tensors".
            shape: Shape of the result, with -1 for that axis.
        """
        dim = shape.index(-1)
        if self.summed is None:
            return torch.cat(list(parts), dim)
        history = self.history
        size = (history.rows if axis == "rows" else history.tensors).shape[-1]
        whole = history.rows.new_zeros(*shape[:dim], size, *shape[dim + 1 :])
        for stack, part in zip(self.stacks, parts, strict=True):
            start, stop = getattr(stack, axis)
            whole.narrow(dim, start, stop - start).copy_(part)
        return whole

    def of_all_ranks(self, tensor: Tensor) -> Tensor:
        """Add up the contributions of all ranks."""
        return tensor if self.summed is None else self.summed(tensor)


@dataclass(eq=False)
class Nodes:
    """Nodes of the graph that rows write and columns read.

    Attributes:
        count: Number of nodes; an additional one stands for everything outside the graph.
        of_row: (R,) node that a row writes.
        rows_of: (count + 1,) number of rows that write each node, at least 1.
        of_source: Nodes that the columns of each stack of kernels here read, (M, columns /
            positions).
        readers: (count + 1,) number of kernels that read each node, at least 1.
    """

    count: int
    of_row: Tensor
    rows_of: Tensor
    of_source: dict[int, Tensor]
    readers: Tensor


# Vectors up to this length share a stack, padded with zeros: on small networks the number of calls
# determines the cost of a step.
SHORT = 4096
# On a CPU, blocks of at least this size are stacked only with those of the same parameter. Their
# gradients and weights are then views; copies would cost more than separate calls.
LARGE = 1 << 16


def geometry(block: Block) -> tuple:
    """Return the key that blocks of one stack share."""
    if block.matrix[:2] == (1, 1) and block.kind not in MATRICES and block.size <= SHORT:
        return ("short",)
    positions = block.stored[3] if block.kind in MATRICES else 1
    return block.kind in MATRICES, block.kind in ("table", "vector"), block.matrix, positions


def arrange(
    spec: NetSpec,
    blocks: Sequence[Block],
    sets: int,
    ages: Sequence[int] | None = None,
    like: Tensor | None = None,
    here: Sequence[bool] | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> Memory:
    """Arrange blocks in stacks, with an empty state.

    Args:
        spec: Specification of the network.
        blocks: Some or all of its blocks.
        sets: Number of sets of weights, N.
        ages: Number of steps of each block so far, 0 by default.
        like: Tensor of the type and on the device of the state.
        here: Whether this rank owns each block, true for all by default.
        summed: Function that adds a tensor up over all ranks, if other ranks own some blocks.
    """
    like = torch.zeros(()) if like is None else like
    ages = ages or [0] * len(blocks)
    here = here or [True] * len(blocks)
    groups: dict[tuple, list[int]] = {}
    for i, block in enumerate(blocks):
        groups.setdefault((*geometry(block), ages[i]), []).append(i)
    stacks: list[Stack] = []
    own: list[Stack] = []
    elsewhere: list[Stack] = []
    row = tensor = 0
    for members in groups.values():
        first = tensor

        def together(i: int) -> tuple[bool, int]:
            alone = like.device.type == "cpu" and blocks[i].size >= LARGE
            return here[i], blocks[i].parameter if alone else -1

        for (mine, _), run in itertools.groupby(members, together):
            found = tuple(blocks[i] for i in run)
            on = like if mine else like.to("meta")
            stack = _stack(found, ages[members[0]], sets, row, tensor, first, on)
            row, tensor = stack.rows[1], stack.tensors[1]
            stacks.append(stack)
            (own if mine else elsewhere).append(stack)
    counts = [(s, b) for s in stacks for b in s.blocks]
    index = [(i, b) for i, (_, b) in enumerate(_by_tensor(counts)) for _ in range(b.matrix[1])]
    tensor_of_row = torch.tensor([i for i, _ in index], dtype=torch.long, device=like.device)
    of_tensor = [b for _, b in _by_tensor(counts)]
    kinds = torch.eye(len(KINDS)).to(like)[
        torch.tensor([KINDS.index(b.kind) for _, b in index], device=like.device)
    ]
    history = History(
        like.new_zeros(NUM_OF_ROW, sets, row),
        like.new_zeros(NUM_OF_TENSOR, sets, tensor),
        like.new_tensor([s.age for s, _ in _by_tensor(counts)]),
    )
    history.rows[LOG_LENGTH] = torch.nan
    constants = Constants(
        tensor_of_row=tensor_of_row,
        scalars_of_row=like.new_tensor([b.matrix[2] for _, b in index]),
        rows_of_tensor=like.new_tensor([b.matrix[1] for b in of_tensor]),
        scalars_of_tensor=like.new_tensor([b.matrix[1] * b.matrix[2] for b in of_tensor]),
        log_torch_rms=-0.5 * (3 * like.new_tensor([b.matrix[2] for b in of_tensor])).log(),
        is_matrix=torch.tensor([b.kind in MATRICES for b in of_tensor], device=like.device),
        kinds=kinds,
        kind_signals=KIND_UNIT * kinds.T[:, None],
        is_relative=torch.tensor(
            [RELATIVE_UNITS[b.kind] > 0 for b in of_tensor], device=like.device
        ),
        log_relative_unit=like.new_tensor([RELATIVE_UNITS[b.kind] for b in of_tensor]).log(),
        log_absolute_unit=like.new_tensor([_absolute_unit(b) for b in of_tensor]).log(),
        decay_units=like.new_tensor(
            [
                [RELATIVE_UNITS[b.kind] if b.kind in kinds else 0.0 for b in of_tensor]
                for kinds in (DECAYING, DECAYING_ON_FEW)
            ]
        ),
        is_decaying=like.new_tensor([b.kind in DECAYING for b in of_tensor]),
        cosine_weights=1 - like.new_tensor(COSINE_DECAYS).view(-1, 1, 1),
        cosine_units=like.new_tensor(COSINE_UNITS).view(-1, 1, 1),
        average_decays=like.new_tensor([FAST, SLOW]).view(2, 1),
        average_weights=like.new_tensor([1 - FAST, 1 - SLOW]).view(2, 1, 1, 1),
        fading=like.new_tensor([[[1.0], [LONG_PART]], [[1 - FAST], [0.0]]]),
        above=torch.tensor([above for above, _, _ in RATIOS], device=like.device),
        below=torch.tensor([below for _, below, _ in RATIOS], device=like.device),
        ratio_units=like.new_tensor([0.5 / unit for _, _, unit in RATIOS]).view(-1, 1, 1),
    )
    nodes = _nodes(spec, stacks, own, like)
    return Memory(tuple(own), history, constants, nodes, tuple(elsewhere), summed)


def _absolute_unit(block: Block) -> float:
    return KERNEL_STEP / block.matrix[2] ** 0.5 if block.kind in MATRICES else VECTOR_STEP


def _by_tensor(counts: list[tuple[Stack, Block]]) -> list[tuple[Stack, Block]]:
    return [(s, b) for s, b in counts for _ in range(b.matrix[0])]


def _stack(
    blocks: tuple[Block, ...],
    age: int,
    sets: int,
    row: int,
    tensor: int,
    first: int,
    like: Tensor,
) -> Stack:
    groups, r, _ = blocks[0].matrix
    c = max(block.matrix[2] for block in blocks)
    m = groups * len(blocks)
    whitens = blocks[0].kind in MATRICES
    left, right = sides(r, c, blocks[0].stored[3]) if whitens else (None, None)

    batch = sets * m

    def square(side: Side | None) -> Tensor | None:
        return side and like.new_zeros(batch, side.blocks, side.length, side.length)

    return Stack(
        blocks,
        age,
        sets,
        (m, r, c),
        (left, right),
        (row, row + m * r),
        (tensor, tensor + m),
        first,
        tensor - first,
        like.new_zeros(NUM_MOMENTA, batch, r, c),
        None if left or right else like.new_zeros(batch, r, c),
        like.new_tensor([b.matrix[1] * b.matrix[2] for b in blocks for _ in range(groups)])
        .rsqrt()
        .repeat(sets)
        .view(-1, 1, 1),
        (square(left), square(right)),
        (square(left), square(right)),
    )


def _nodes(spec: NetSpec, stacks: Sequence[Stack], own: Sequence[Stack], like: Tensor) -> Nodes:
    """Number the neurons of all sets consecutively, and look up those of each row and column."""
    starts = [0]
    for neurons in spec.neurons:
        starts.append(starts[-1] + neurons.size)
    count = starts[-1]

    def at(place: tuple[int, int] | None, size: int) -> list[int]:
        if place is None:
            return [count] * size
        return list(range(starts[place[0]] + place[1], starts[place[0]] + place[1] + size))

    of_row: list[int] = []
    of_source: dict[int, Tensor] = {}
    readers = torch.zeros(count + 1)
    number = {id(stack): s for s, stack in enumerate(own)}
    for stack in stacks:
        read: list[list[int]] = []
        for b in stack.blocks:
            groups, r, c = b.matrix
            writes = b.kind not in ("table", "vector")
            of_row += at(b.target if writes else None, groups * r)
            if stack.is_matrix:
                each = c // b.stored[3]
                found = at(b.source, groups * each)
                read += [found[i : i + each] for i in range(0, len(found), each)]
        if stack.is_matrix:
            sources = torch.tensor(read)
            readers.index_add_(0, sources.flatten(), torch.ones(sources.numel()))
            if id(stack) in number:
                of_source[number[id(stack)]] = sources.to(like.device)
    rows = torch.tensor(of_row, dtype=torch.long)
    rows_of = torch.zeros(count + 1).index_add_(0, rows, torch.ones(len(of_row)))
    return Nodes(
        count,
        rows.to(like.device),
        rows_of.clamp(min=1).to(like),
        of_source,
        readers.clamp(min=1).to(like),
    )


def joined(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Merge adjacent kernels of equal grid in a parameter into one with groups.

    It can then be taken and put as one view.
    """
    answer: list[Block] = []
    for block in blocks:
        if answer and block.kind in MATRICES:
            last = answer[-1]
            if (last.parameter, last.start + last.size) == (block.parameter, block.start) and (
                last.stored[1:],
                last.transposed,
            ) == (block.stored[1:], block.transposed):
                groups = last.stored[0] + block.stored[0]
                answer[-1] = replace(last, stored=(groups, *block.stored[1:]))
                continue
        answer.append(block)
    return tuple(answer)


def gathered(memory: Memory, tensors: Sequence[Tensor] | Mapping[int, Tensor]) -> list[Tensor]:
    """Arrange tensors of parameters as stacks.

    Args:
        memory: Memory of the network.
        tensors: Flattened tensor of each parameter by its index in the network, (N, size).

    Returns:
        Tensor of each stack here, (B, r, c): a view, if possible, for a stack of one block.
    """
    answer = []
    for stack in memory.stacks:
        parts = [run.take(tensors[run.parameter]) for run in stack.runs]
        if len(parts) > 1:
            width = stack.shape[2]
            parts = [
                x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))
                for x in parts
            ]
            parts = [torch.cat(parts, 1)]
        answer.append(parts[0].flatten(0, 1))
    return answer


def scattered(memory: Memory, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Arrange tensors of stacks as parameters, (N, size) by index: the inverse of ``gathered``."""
    parts: dict[int, list[tuple[int, Tensor]]] = {}
    for stack, tensor in zip(memory.stacks, tensors, strict=True):
        at, sets = 0, tensor.unflatten(0, (stack.sets, -1))
        for run in stack.runs:
            groups, _, columns = run.matrix
            piece = run.put(sets[:, at : at + groups, :, :columns])
            parts.setdefault(run.parameter, []).append((run.start, piece))
            at += groups
    return {
        i: found[0][1]
        if len(found) == 1
        else torch.cat([x for _, x in sorted(found, key=_start)], 1)
        for i, found in parts.items()
    }


def _start(part: tuple[int, Tensor]) -> int:
    return part[0]
