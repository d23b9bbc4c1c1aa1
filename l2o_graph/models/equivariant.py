"""All linear maps between weight spaces that commute with permutations of neurons.

A weight space is a list of tensors. Each axis of a tensor runs over a set of neurons, which may be
permuted, or over something that has an order. This determines all equivariant linear maps (Maron
et al. 2019 for one tensor, Zhou et al. 2024, "Universal Neural Functionals", for many). An axis of
the output is tied to an input axis over the same neurons, or the output is constant along it. An
input axis that is not tied is averaged over, and fixed axes are mixed freely. Each map is an einsum
formula; those of a kernel to itself are ``ij->ij``, ``ik->ij``, ``kj->ij`` and ``kl->ij``. No
tensor may have the same neurons on two axes, as a recurrent kernel would.

Three published layers are special cases:

- NFN-NP (Zhou et al. 2023, "Permutation Equivariant Neural Functionals", section 3): all neurons
  permutable, ``weight_space(spec, NP)``. Tensors that share neurons exchange rows and columns,
  all others full means: 4 L^2 + 10 L - 4 maps for an MLP of L layers.
- NFN-HNP (same): hidden neurons permutable, inputs and outputs fixed, ``weight_space(spec, HNP)``.
  Every input and output has its own weights. The released layer also reads full means over inputs
  and outputs, which are linear combinations of its other terms.
- DWSNet (Navon et al. 2023): the symmetry, and therefore the space of maps, of HNP. Its release
  has nonlinear options: pooling by maximum, and a small network in place of a matrix.

Positions of a convolution are a fixed axis in all three.
"""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.spec import Kernel, NetSpec, Role

NP: tuple[Role, ...] = ("input", "hidden", "output")
HNP: tuple[Role, ...] = ("hidden",)


@dataclass(frozen=True, slots=True)
class Axis:
    """Index set of an axis of a tensor; equal axes are permuted together."""

    name: str
    size: int
    permutable: bool


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name (only for messages) and axes of a tensor of a weight space."""

    name: str
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""
        return tuple(axis.size for axis in self.axes)

    @property
    def free(self) -> tuple[Axis, ...]:
        """Permutable axes, in order."""
        return tuple(axis for axis in self.axes if axis.permutable)

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """Size of each fixed axis."""
        return tuple(axis.size for axis in self.axes if not axis.permutable)

    @property
    def order(self) -> tuple[int, ...]:
        """Positions of the fixed axes, then of the permutable ones."""
        return tuple(sorted(range(len(self.axes)), key=lambda a: self.axes[a].permutable))


def weight_space(spec: NetSpec, permutable: Collection[Role]) -> tuple[TensorSpec, ...]:
    """Describe the parameters of a network as a weight space.

    Args:
        spec: Specification of a network of kernels and biases.
        permutable: Roles of the neurons that may be permuted: ``NP`` or ``HNP``.

    Returns:
        A tensor for each parameter, in order: (out, in, *positions) or (out,). A linear layer
        after a flattened map has one position for each pixel, so its parameter has to be viewed
        in the shape given here.

    Raises:
        ValueError: If a parameter is loose, or consists of several kernels or biases or of a
            kernel in groups, so that its axes are not its neurons; and if a kernel joins a set to
            itself.
    """
    if spec.loose:
        names = ", ".join(repr(spec.names[i]) for i in spec.loose)
        raise ValueError(f"expected only kernels and biases, found loose parameters {names}")
    for k in (*spec.kernels, *spec.biases):
        if spec.is_constant(k.parameter):
            raise ValueError(f"expected only kernels and biases, found a constant ({k})")
        whole = k.size == math.prod(spec.shapes[k.parameter])
        if not whole or (isinstance(k, Kernel) and (k.grid[0] > 1 or k.from_rows)):
            name = repr(spec.names[k.parameter])
            raise ValueError(f"expected only whole kernels [out, in, *positions], found {name}")
        if isinstance(k, Kernel) and k.source == k.target:
            name = repr(spec.names[k.parameter])
            raise ValueError(f"expected kernels between two sets of neurons, found {name}")
    neurons = [
        Axis(f"neurons {n}", one.size, one.role in permutable) for n, one in enumerate(spec.neurons)
    ]
    axes: dict[int, tuple[Axis, ...]] = {b.parameter: (neurons[b.neurons],) for b in spec.biases}
    for kernel in spec.kernels:
        positions = [Axis("position", size, False) for size in kernel.positions]
        axes[kernel.parameter] = (neurons[kernel.target], neurons[kernel.source], *positions)
    return tuple(TensorSpec(name, axes[i]) for i, name in enumerate(spec.names))


def ways_to_tie(source: TensorSpec, target: TensorSpec) -> list[tuple[Axis, ...]]:
    """List the axes that each map from source to target ties: a basis of all maps.

    Each stands for one map per pair of entries of the two tensors' fixed axes. An axis of one
    neuron is always tied, because averaging or broadcasting over it would be the same.
    """
    shared = [axis for axis in target.free if axis in source.free]
    ways = [((axis,),) if axis.size == 1 else ((axis,), ()) for axis in shared]
    return [sum(way, ()) for way in itertools.product(*ways)]


def averaged(
    x: Float[Tensor, "B C ..."], spec: TensorSpec, kept: Sequence[Axis]
) -> Float[Tensor, "B C ..."]:
    """Average a tensor, whose fixed axes are channels, over all axes but those in ``kept``."""
    free = spec.free
    answer = torch.einsum(
        x, [0, 1, *range(2, x.dim())], [0, 1, *(2 + free.index(axis) for axis in kept)]
    )
    count = math.prod(axis.size for axis in free if axis not in kept)
    return answer if count == 1 else answer / count


@dataclass(frozen=True, slots=True)
class OutputMap:
    """All maps to one tensor that tie the same axes; they are added before broadcasting.

    ``sources`` are the indices of the tensors that they read; the constant is the last.
    """

    target: int
    tied: tuple[Axis, ...]
    sources: tuple[int, ...]


ONE = TensorSpec("one", ())  # a constant 1, for the biases of outputs


class EquivariantLinear(nn.Module):
    """Equivariant affine layer of a weight space, with a matrix of channels for each map.

    Maps to the same tensor that tie the same axes share one matrix product. Fixed axes are folded
    into the channels. A constant 1 is an additional input tensor that provides biases: one for
    each channel and fixed index, equal along the permutable axes. At initialisation, each matrix
    has an equal share in the mean square of the output: if inputs have unit size, outputs have
    unit size if all inputs are equal, and at least the share of the identity if they are
    independent.

    Args:
        space: Tensors of the weight space; equal axes are permuted together.
        in_channels: Number of input features of each entry.
        out_channels: Number of output features of each entry.
    """

    def __init__(self, space: Sequence[TensorSpec], in_channels: int, out_channels: int):
        super().__init__()
        self.space = tuple(space)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.landings: list[OutputMap] = []
        self.weights = nn.ParameterList()
        for t, target in enumerate(self.space):
            sources: dict[tuple[Axis, ...], list[int]] = {}
            for s, source in enumerate((*self.space, ONE)):
                for tied in ways_to_tie(source, target):
                    sources.setdefault(tied, []).append(s)
            # Smallest terms first: the sum has full size only once a term has.
            for tied in sorted(sources, key=len):
                fan_in = sum(self._channels(s) for s in sources[tied])
                outputs = out_channels * math.prod(target.fixed_shape)
                weight = torch.randn(outputs, fan_in) / math.sqrt(fan_in * len(sources))
                self.landings.append(OutputMap(t, tied, tuple(sources[tied])))
                self.weights.append(nn.Parameter(weight))

    def _channels(self, source: int) -> int:
        """Return the number of channels times fixed entries of a tensor, 1 for the constant."""
        if source == len(self.space):
            return 1
        return self.in_channels * math.prod(self.space[source].fixed_shape)

    def forward(
        self, tensors: Sequence[Float[Tensor, "B C ..."]]
    ) -> list[Float[Tensor, "B out ..."]]:
        """Map features (B, C, *shape) of each tensor from ``in_channels`` to ``out_channels``."""
        folded = [_folded(spec, x) for spec, x in zip(self.space, tensors, strict=True)]
        folded.append(folded[0].new_ones(len(folded[0]), 1))
        specs = (*self.space, ONE)
        needed = dict.fromkeys(
            (s, landing.tied) for landing in self.landings for s in landing.sources
        )
        pools = {(s, kept): averaged(folded[s], specs[s], kept) for s, kept in needed}
        answer: dict[int, Tensor] = {}
        for landing, weight in zip(self.landings, self.weights, strict=True):
            read = [pools[s, landing.tied] for s in landing.sources]
            read = torch.cat(read, dim=1) if len(read) > 1 else read[0]
            if landing.tied:
                # A product for each network: for a joint one, torch would copy the features twice.
                mixed = weight.expand(len(read), -1, -1) @ read.flatten(2)
            else:
                mixed = (read @ weight.T)[..., None]
            t = landing.target
            free = self.space[t].free
            sides = [axis.size if axis in landing.tied else 1 for axis in free]
            term = mixed.reshape(*mixed.shape[:2], *sides)
            answer[t] = answer[t] + term if t in answer else term
        return [_unfolded(spec, answer[t]) for t, spec in enumerate(self.space)]


def _folded(spec: TensorSpec, x: Tensor) -> Float[Tensor, "B C ..."]:
    """Fold fixed axes into the channels: (B, C, *shape) -> (B, C * fixed, *free)."""
    x = x.permute(0, 1, *(2 + axis for axis in spec.order))
    return x.flatten(1, 1 + len(spec.fixed_shape))


def _unfolded(spec: TensorSpec, x: Tensor) -> Float[Tensor, "B C ..."]:
    """Undo ``_folded``: (B, C * fixed, *free) -> (B, C, *shape)."""
    x = x.unflatten(1, (-1, *spec.fixed_shape))
    back = sorted(range(len(spec.order)), key=lambda axis: spec.order[axis])
    return x.permute(0, 1, *(2 + axis for axis in back))
