"""(parameters, gradients, momenta) -> the features of any run of scalars.

An observation holds views of one parameter's tensors and the little that all its scalars share.
The features of its scalars are made where they are used, for one chunk at a time.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph import features as f
from l2o_graph.architecture import CONSTANTS, Kernel, NetSpec
from l2o_graph.models.embedding import Part, Scalars

SLOWEST_ROW = f.NUM_LOG_SIGN + f.NUM_RAW - 1  # the slowest momentum over its RMS
NOMINAL_ROW = f.NUM_LOG_SIGN + f.NUM_RAW
NUM_FEATURES = NOMINAL_ROW + 1

# Makes the RMS of squashed normal values 1.
SQUASHED_TO_UNIT = 1.7

# A tensor whose gradients are this much smaller than those of the whole network has gradients of
# rounding errors alone, as a bias in front of a norm has: they are not blown up to unit size.
NOISE = 1e-8

# Scalars of a momentum that enter its Gram matrix at once.
GRAM_BLOCK = 1 << 20

# Scalars whose orthogonal directions are kept during a step: 128 MB.
MOST_HELD = 1 << 25

# Scalars of a direction that is not kept worked out at once: 16 MB. A row of it mixes all rows of
# its matrix, which is a waste to read for the few rows of a chunk.
DIRECTION_BLOCK = 1 << 22

# A tensor whose RMS is smaller counts as a constant. Derivatives of what is relative to an RMS
# take its third power, which float32 holds up to 1e38.
SMALLEST_RMS = 1e-12


@dataclass(frozen=True, slots=True)
class Matrix:
    """A parameter as matrices, one for each of its kernels and their groups.

    Attributes:
        groups: How many matrices.
        rows: Of each.
        columns: Of each, kernel positions among them.
        fan_in: Values that one neuron reads.
        mixes: Whether it mixes several neurons into several, so that there are directions to make
            orthogonal; a depthwise kernel and a table of embeddings do not.
    """

    groups: int
    rows: int
    columns: int
    fan_in: int
    mixes: bool


class Latest:
    """What was worked out last, for those who ask for parts of it one after the other."""

    def __init__(self) -> None:
        self._key, self._value = None, None

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The value of a key, made anew if the last one asked for was another."""
        if self._value is None or key != self._key:
            self._value = None  # gone before the next one takes its room
            self._key, self._value = key, make()
        return self._value


@dataclass(frozen=True, slots=True)
class Observation:
    """One parameter as a step sees it.

    Attributes:
        weight: (n,) flattened.
        gradient: (n,) flattened.
        momenta: (5, n) flattened.
        scale: (7,) RMS of weight, gradient and momenta over the tensor.
        shared: (T,) features of the tensor.
        age: Updates that the parameter had before this one.
        matrix: For kernels; None for vectors, tables and what has no place in the graph.
        several_axes: Whether the parameter is more than a vector.
        nominal_scale: RMS over the tensor of the momentum that the nominal step follows, never 0.
        whitener: What turns that momentum into orthogonal matrices, if wanted.
        latest: Shared by all parameters: of directions that are not kept, the last rows.
        held: (n,) the whole nominal direction, where it is kept rather than worked out twice.
    """

    weight: Float[Tensor, " n"]
    gradient: Float[Tensor, " n"]
    momenta: Float[Tensor, "B n"]
    scale: Float[Tensor, " R"]
    shared: Float[Tensor, " T"]
    age: Float[Tensor, ""]
    matrix: Matrix | None
    several_axes: bool
    nominal_scale: Float[Tensor, ""]
    whitener: Float[Tensor, "groups s s"] | None
    latest: Latest
    held: Float[Tensor, " n"] | None = None

    @property
    def fan_in(self) -> int:
        """Values that one neuron of a kernel reads; 0 for what is not a kernel."""
        return self.matrix.fan_in if self.matrix else 0

    def raw(self, start: int, stop: int) -> Float[Tensor, "R n"]:
        """Weight, gradient and momenta of the scalars from start to stop."""
        momenta = self.momenta[:, start:stop]
        return torch.cat([self.weight[None, start:stop], self.gradient[None, start:stop], momenta])

    def nominal(self, start: int, stop: int) -> Float[Tensor, " n"]:
        """The nominal direction of the scalars from start to stop, of RMS about 1.

        For a kernel it is the orthogonal matrix closest to the momentum (Jordan et al. 2024),
        times sqrt(max(rows, columns)), or without a whitener the momentum squashed parameter by
        parameter; for vectors the momentum over its RMS.
        """
        run = slice(start, stop)
        if self.held is not None:
            return self.held[run]
        gradient, momentum = self.gradient[run], self.momenta[f.NOMINAL, run]
        if self.whitener is None or self.matrix is None:
            follow = gradient + f.NOMINAL_DECAY * momentum
            if self.several_axes:
                return SQUASHED_TO_UNIT * f.squashed(follow, self.nominal_scale)
            return follow / self.nominal_scale
        rows, columns = self.matrix.rows, self.matrix.columns
        size = max(rows, columns) ** 0.5
        first, last = start // columns, stop // columns  # rows, of all groups together
        groups = slice(first // rows, -(-last // rows))
        if rows <= columns and self.matrix.groups == 1:
            return self._mixed_rows(first, last).reshape(-1)
        if rows > columns:
            whitener = self.whitener[groups] * size
            follow = gradient + f.NOMINAL_DECAY * momentum
            return (follow.view(len(whitener), -1, columns) @ whitener).reshape(-1)
        # A row of the answer is a mixture of all rows of its group.
        whole = slice(groups.start * rows * columns, groups.stop * rows * columns)
        gradient, momentum = self.gradient[whole], self.momenta[f.NOMINAL, whole]
        follow = (gradient + f.NOMINAL_DECAY * momentum).view(-1, rows, columns)
        within = slice(first - groups.start * rows, last - (groups.stop - 1) * rows)
        q = self.whitener[groups, within if len(follow) == 1 else slice(None)] * size
        return (q @ follow).reshape(-1)

    def _mixed_rows(self, first: int, last: int) -> Float[Tensor, "rows columns"]:
        """Rows of the orthogonal matrix of a single matrix, each a mixture of all its rows."""
        assert self.matrix is not None and self.whitener is not None
        rows, columns = self.matrix.rows, self.matrix.columns
        (whitener,) = self.whitener
        momentum = self.momenta[f.NOMINAL].view(rows, columns)
        # Block by block in both directions: no sum is as large as the parameter.
        height, width = max(DIRECTION_BLOCK // columns, 1), max(DIRECTION_BLOCK // rows, 1)
        gradients = self.gradient.view(rows, columns).split(width, dim=1)
        pairs = list(zip(gradients, momentum.split(width, dim=1), strict=True))
        found = []
        for start in range(first // height * height, last, height):

            def block(start: int = start) -> Tensor:
                q = whitener[start : start + height] * columns**0.5
                parts = [q @ (g + f.NOMINAL_DECAY * m) for g, m in pairs]
                return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

            direction = self.latest.get((id(self.whitener), start), block)
            found.append(direction[max(first - start, 0) : last - start])
        return found[0] if len(found) == 1 else torch.cat(found)


def observe(
    spec: NetSpec,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    steps: Sequence[Tensor],
    dtype: torch.dtype,
    orthogonal: bool = True,
) -> list[Observation]:
    """Observe every parameter; differentiable where gradients are enabled.

    Args:
        spec: Which parameter joins which neurons.
        parameters: P tensors of any shape.
        gradients: Their gradients.
        momenta: Their momenta, (5, *shape) each, this gradient included.
        steps: Updates that each parameter had before this one, 0-dimensional.
        dtype: What to compute in.
        orthogonal: Whether the nominal direction of kernels is to be orthogonal.
    """
    matrices = matrices_of(spec)[: len(parameters)]
    several_axes = [p.dim() > 1 for p in parameters]
    weights = [p.reshape(-1).to(dtype) for p in parameters]
    gradients = [g.reshape(-1).to(dtype) for g in gradients]
    momenta = [(m.flatten(1) if m.dim() > 1 else m[:, None]).to(dtype) for m in momenta]
    whiten = [orthogonal and m is not None and m.mixes for m in matrices]
    if torch.is_grad_enabled():
        # What is whitened has an RMS, or a norm, for each of its matrices.
        groups = [
            m.groups if m and wanted else 1 for m, wanted in zip(matrices, whiten, strict=True)
        ]
        weights = [_constant_at_zero(w) for w in weights]
        gradients = [_constant_at_zero(g, n) for g, n in zip(gradients, groups, strict=True)]
        momenta = [_constant_at_zero(m, n) for m, n in zip(momenta, groups, strict=True)]
    ages = torch.stack(list(steps)).to(dtype)
    sizes = ages.new_tensor([max(len(w), 1) for w in weights])
    fan_ins = ages.new_tensor([m.fan_in if m else 1 for m in matrices])
    scale = _norms(weights, gradients, momenta) / sizes.sqrt()[:, None]
    scale = torch.cat([scale[:, :1], _above_noise(scale[:, 1:])], dim=1)
    shared = f.tensor_features(scale, fan_ins, ages, _roles(spec)[: len(parameters)].to(ages))
    grams = [
        _gram(g, m[f.NOMINAL], matrix if wanted else None)
        for g, m, matrix, wanted in zip(gradients, momenta, matrices, whiten, strict=True)
    ]
    squares = torch.stack([gram.diagonal(dim1=1, dim2=2).sum() for gram in grams])
    of_nominal = (squares / sizes + f.TINY).sqrt()
    nominal_scale = _above_noise(of_nominal)
    damped = (of_nominal / nominal_scale).detach()
    found = iter(f.whiteners([gram for gram, wanted in zip(grams, whiten, strict=True) if wanted]))
    whiteners = [
        next(found) * damp if wanted else None for wanted, damp in zip(whiten, damped, strict=True)
    ]
    rows = zip(
        weights, gradients, momenta, scale, shared, ages, matrices, several_axes, nominal_scale,
        whiteners, [Latest()] * len(weights), strict=True,
    )  # fmt: skip
    return _holding([Observation(*row) for row in rows])


def _holding(observations: Sequence[Observation]) -> list[Observation]:
    """The same, with the orthogonal directions of as many parameters as there is room for."""
    answer, room = [], MOST_HELD
    for o in observations:
        size = len(o.weight)
        if o.whitener is not None and size <= room:
            room -= size
            o = replace(o, held=o.nominal(0, size))
        answer.append(o)
    return answer


@lru_cache(maxsize=64)
def matrices_of(spec: NetSpec) -> tuple[Matrix | None, ...]:
    """Every parameter as matrices, None where it is none; last the constants."""
    answer: list[Matrix | None] = []
    for i, shape in enumerate(spec.shapes):
        kernels = [k for k in spec.kernels if k.parameter == i and not k.again]
        answer.append(_matrix(kernels) if len(shape) > 1 else None)
    return (*answer, *[None] * len(CONSTANTS))


def _matrix(kernels: Sequence[Kernel]) -> Matrix | None:
    """The kernels of one parameter as matrices of one size: apart, or else on top of each other."""
    if not kernels or any(k.kind == "lookup" for k in kernels):
        return None
    first = kernels[0]
    _, rows, columns = first.grid
    groups = sum(k.grid[0] for k in kernels)
    if any(k.row != first.row or k.from_rows != first.from_rows for k in kernels):
        return None
    if any(k.grid[1] != rows for k in kernels):  # as of queries, keys and values in one
        groups, rows = 1, sum(k.grid[0] * k.grid[1] for k in kernels)
    read = rows if first.from_rows else columns
    mixes = groups == 1 or min(rows, columns) > 1
    return Matrix(groups, rows, first.row, read * math.prod(first.positions), mixes)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def _roles(spec: NetSpec) -> Float[Tensor, "N 2"]:
    """Whether each parameter reads inputs, and writes outputs; last the constants."""
    roles = torch.zeros(len(spec.shapes) + len(CONSTANTS), f.NUM_ROLES)
    for kernel in spec.kernels:
        reads = spec.neurons[kernel.source].role == "input"
        writes = spec.neurons[kernel.target].role == "output"
        roles[kernel.parameter] = torch.maximum(
            roles[kernel.parameter], torch.tensor([float(reads), float(writes)])
        )
    for bias in spec.biases:
        if spec.neurons[bias.neurons].role == "output":
            roles[bias.parameter, 1] = 1
    roles[len(spec.shapes) :] = 0
    return roles


def _above_noise(scale: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
    """RMS of N tensors, none further below the largest than noise is."""
    return torch.maximum(scale, NOISE * scale.detach().amax(0))


def _constant_at_zero(x: Float[Tensor, "*R n"], groups: int = 1) -> Float[Tensor, "*R n"]:
    """The same values, but to autograd a group whose RMS is next to 0 is a constant.

    Features relative to an RMS jump where a tensor is 0, as a bias may be at its start and the
    gradient of a dead layer always is: their slope there is infinite, or 0 / 0. It counts as 0
    instead, as torch has it for the slope of a norm.
    """
    apart = x.unflatten(-1, (groups, x.shape[-1] // groups))
    rms = apart.detach().square().mean(-1, keepdim=True).sqrt()
    return torch.where(rms > SMALLEST_RMS, apart, apart.detach()).flatten(-2)


def _norms(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], momenta: Sequence[Tensor]
) -> Float[Tensor, "N R"]:
    """Euclidean norm of the weight, the gradient and each momentum of N parameters."""
    norm = torch.linalg.vector_norm
    first = [torch.stack([norm(x) for x in xs])[:, None] for xs in (weights, gradients)]
    return torch.cat([*first, torch.stack([norm(m, dim=1) for m in momenta])], dim=1)


def _gram(gradient: Tensor, momentum: Tensor, matrix: Matrix | None) -> Float[Tensor, "groups s s"]:
    """Gram matrices of the shorter side of g + beta m, in bounded memory.

    Without a matrix the sum of squares, as the Gram matrix of a single row.
    """
    shape = (matrix.groups, matrix.rows, matrix.columns) if matrix else (1, 1, -1)
    gradient, momentum = gradient.view(shape), momentum.view(shape)
    if gradient.shape[1] > gradient.shape[2]:
        gradient, momentum = gradient.mT, momentum.mT
    groups, short, _ = gradient.shape
    width = max(GRAM_BLOCK // max(groups * short, 1), 1)
    blocks = zip(gradient.split(width, dim=2), momentum.split(width, dim=2), strict=True)
    follow = (torch.add(g, m, alpha=f.NOMINAL_DECAY) for g, m in blocks)
    return functools.reduce(torch.add, (x @ x.mT for x in follow))


def scalars_of(observations: Sequence[Observation], parts: Sequence[Part]) -> Scalars:
    """The features of some parts' scalars: 14 log and sign, 7 relative to RMS, 1 nominal."""
    if not parts:
        return Scalars((), observations[0].weight.new_zeros(NUM_FEATURES, 0))
    of = [observations[part.parameter] for part in parts]
    raw = torch.cat([o.raw(p.start, p.stop) for o, p in zip(of, parts, strict=True)], dim=1)
    scale = torch.cat(
        [o.scale[:, None].expand(-1, p.stop - p.start) for o, p in zip(of, parts, strict=True)],
        dim=1,
    )
    nominal = torch.cat([o.nominal(p.start, p.stop) for o, p in zip(of, parts, strict=True)])
    x = torch.cat([f.log_sign(raw), f.squashed(raw, scale), nominal[None]])
    return Scalars(tuple(parts), x)
