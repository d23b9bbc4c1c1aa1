"""All linear maps between weight spaces that commute with permutations of neurons.

A weight space is a list of tensors, each axis of which runs over a set of neurons that may be
permuted or over something that has an order. From that alone follows every equivariant linear
map (Maron et al. 2019 for one tensor, Zhou et al. 2024, "Universal Neural Functionals", for
many): an axis of the output is tied to an axis of the input on the same neurons or the output is
constant along it, an input axis that is not tied is averaged over, and fixed axes are mixed
freely. Each map is an einsum formula; a kernel's to itself are ``ij->ij``, ``ik->ij``,
``kj->ij`` and ``kl->ij``. No tensor has the same neurons twice, as a recurrent kernel would.

Three published layers are this one, on three specifications:

- NFN-NP (Zhou et al. 2023, "Permutation Equivariant Neural Functionals", section 3): all neurons
  permutable, ``weight_space(spec, NP)``. Tensors that share neurons exchange rows and columns,
  all others full means: 4 L^2 + 10 L - 4 maps for an MLP of L layers.
- NFN-HNP (same): hidden neurons permutable, inputs and outputs fixed, ``weight_space(spec, HNP)``.
  Every input and output has weights of its own. The released layer also reads full means over
  inputs and outputs, which are combinations of what it reads already.
- DWSNet (Navon et al. 2023): the symmetry, therefore the specification and the space of maps, of
  HNP. Its release differs in what is not linear: it may pool by maximum, and put a small network
  for a matrix.

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
    """What an axis of a tensor runs over; equal axes are permuted together.

    The order of the entries of a permutable one means nothing.
    """

    name: str
    size: int
    permutable: bool


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a weight space: its name, for people, and what each of its axes runs over."""

    name: str
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""
        return tuple(axis.size for axis in self.axes)

    @property
    def free(self) -> tuple[Axis, ...]:
        """The permutable axes, in order."""
        return tuple(axis for axis in self.axes if axis.permutable)

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """Size of each axis that has an order."""
        return tuple(axis.size for axis in self.axes if not axis.permutable)

    @property
    def order(self) -> tuple[int, ...]:
        """Positions of the fixed axes, then of the permutable ones."""
        return tuple(sorted(range(len(self.axes)), key=lambda a: self.axes[a].permutable))


def weight_space(spec: NetSpec, permutable: Collection[Role]) -> tuple[TensorSpec, ...]:
    """The parameters of a network as a weight space.

    Args:
        spec: The network, all of it kernels and biases.
        permutable: Roles of the neurons whose order means nothing: ``NP`` or ``HNP``.

    Returns:
        A tensor for each parameter, in order: (out, in, *positions) or (out,). A linear layer
        behind a flattened map has one position for each pixel, so its parameter is to be viewed
        in the shape given here.

    Raises:
        ValueError: When a parameter is loose, so that nothing is known of what permutes it, or
            more than one kernel or bias, or a kernel in groups: its axes are then not its neurons;
            and when a kernel joins a set to itself.
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
    """Of every map from the source to the target the axes that it ties: independent, and complete.

    A map stands for as many as there are pairs of entries of the two tensors' fixed axes. An axis
    of one neuron is always tied: to average over it, or to broadcast, would be the same.
    """
    shared = [axis for axis in target.free if axis in source.free]
    ways = [((axis,),) if axis.size == 1 else ((axis,), ()) for axis in shared]
    return [sum(way, ()) for way in itertools.product(*ways)]


def averaged(
    x: Float[Tensor, "B C ..."], spec: TensorSpec, kept: Sequence[Axis]
) -> Float[Tensor, "B C ..."]:
    """A tensor whose fixed axes are channels, averaged over all but the axes kept, in their order.

    The constant has no axes.
    """
    free = spec.free
    answer = torch.einsum(
        x, [0, 1, *range(2, x.dim())], [0, 1, *(2 + free.index(axis) for axis in kept)]
    )
    count = math.prod(axis.size for axis in free if axis not in kept)
    return answer if count == 1 else answer / count


@dataclass(frozen=True, slots=True)
class OutputMap:
    """All maps to one tensor that tie the same axes: they are added before they are broadcast.

    ``sources`` are the tensors that they read, by number, behind all of them the constant.
    """

    target: int
    tied: tuple[Axis, ...]
    sources: tuple[int, ...]


ONE = TensorSpec("one", ())  # a constant 1, which gives outputs their biases


class EquivariantLinear(nn.Module):
    """Every equivariant affine map of a weight space, one matrix of channels for each.

    Maps that write alike share one matrix product. Fixed axes are folded into the channels, and
    a constant 1 is one more tensor to read, which gives each output its biases: one for each
    channel and fixed index, equal along the permutable axes. At first, each matrix has an equal
    share in the mean square of the output: inputs of unit size give outputs of unit size when
    all agree, and when they are independent no less than the share of the identity.

    Args:
        space: The tensors; where axes are equal, they are permuted together.
        in_channels: Features of each entry.
        out_channels: Features of each entry of the answer.
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
            # The least first: a sum has the full size only once a term has.
            for tied in sorted(sources, key=len):
                fan_in = sum(self._channels(s) for s in sources[tied])
                outputs = out_channels * math.prod(target.fixed_shape)
                weight = torch.randn(outputs, fan_in) / math.sqrt(fan_in * len(sources))
                self.landings.append(OutputMap(t, tied, tuple(sources[tied])))
                self.weights.append(nn.Parameter(weight))

    def _channels(self, source: int) -> int:
        """Channels and fixed entries of a tensor, or of the constant."""
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
                # A product for each network: for one of all, torch copies features there and back.
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
    """(B, C, *shape) -> (B, C * fixed, *free)."""
    x = x.permute(0, 1, *(2 + axis for axis in spec.order))
    return x.flatten(1, 1 + len(spec.fixed_shape))


def _unfolded(spec: TensorSpec, x: Tensor) -> Float[Tensor, "B C ..."]:
    """(B, C * fixed, *free) -> (B, C, *shape)."""
    x = x.unflatten(1, (-1, *spec.fixed_shape))
    back = sorted(range(len(spec.order)), key=lambda axis: spec.order[axis])
    return x.permute(0, 1, *(2 + axis for axis in back))
