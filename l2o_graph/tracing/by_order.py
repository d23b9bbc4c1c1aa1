"""Structure of a chain of layers, inferred from order, shapes and names of its parameters.

Each layer is assumed to read the output of the one before. Residual connections, branches,
transposed and grouped convolutions require tracing.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from l2o_graph.layout.spec import Bias, Kernel, NetSpec, Neurons
from l2o_graph.tracing.checks import check_parameter, named_parameters

# Modules whose weight is [out, in, *positions], and those with a scale for each neuron. Parameters
# of other modules are loose.
KERNEL_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORM_MODULES = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, slots=True)
class Layer:
    """Layer as indices of its parameters: the weight of a kernel or norm, and a bias, if any."""

    weight: int
    bias: int | None
    is_norm: bool


def spec_of_module(module: nn.Module) -> NetSpec:
    """Infer the structure of a network whose layers are registered in the order of computation.

    Args:
        module: MLP or CNN, possibly with norms, and with global pooling or flattening before its
            linear layers.

    Returns:
        The specification, with parameters in the order of ``module.parameters()``.

    Raises:
        ValueError: For a lazy module before its first call.
    """
    named = named_parameters(module)
    for name, p in named:
        check_parameter(p, f"parameter '{name}'")
    index = {id(p): i for i, (_, p) in enumerate(named)}
    names, shapes = [name for name, _ in named], [tuple(p.shape) for _, p in named]
    layers: dict[int, Layer] = {}
    for part in module.modules():
        own = {n: index[id(p)] for n, p in part.named_parameters(recurse=False) if id(p) in index}
        is_norm = isinstance(part, NORM_MODULES)
        is_kernel = isinstance(part, KERNEL_MODULES) and getattr(part, "groups", 1) == 1
        if "weight" in own and (is_norm or is_kernel):
            layers.setdefault(own["weight"], Layer(own["weight"], own.get("bias"), is_norm))
    return _chain(names, shapes, [layers[i] for i in sorted(layers)])


def spec_of_parameters(parameters: Iterable[Tensor], names: Sequence[str] | None = None) -> NetSpec:
    """Infer the structure of a network from the order and shapes of its parameters.

    A tensor with two or more axes is a kernel, [out, in, *positions]. Vectors of length ``out``
    after it are pairs of scales and shifts of norms; if their number is odd, the first is a bias.
    With names, parameters with the same prefix form a layer: a kernel with its bias, at any
    position, or the "weight" of a norm with its bias.

    Parameters stacked along a first axis, with biases [members, out] after kernels [members, out,
    in, *positions], are an ensemble of independent networks, as from
    ``torch.func.stack_module_state``.

    Args:
        parameters: Tensors in the order in which the network uses them.
        names: Their names, as from ``named_parameters()``.

    Returns:
        The specification, with parameters in the given order.

    Raises:
        ValueError: Without parameters, and for one of a lazy module before its first call.
        TypeError: For anything but tensors.
    """
    parameters = list(parameters)
    for i, p in enumerate(parameters):
        check_parameter(p, f"parameter {i}" if names is None else f"parameter '{names[i]}'")
    shapes = [tuple(p.shape) for p in parameters]
    if not shapes:
        raise ValueError("expected at least one parameter, found an empty list")
    called = names or [f"parameter {i}" for i in range(len(shapes))]
    members = _members(shapes)
    own = [shape[1:] for shape in shapes] if members > 1 else shapes
    layers = _by_order(own) if names is None else _by_name(own, names)
    spec = _chain(called, own, layers)
    return _side_by_side(spec, members) if members > 1 else spec


def _members(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the number of stacked networks, or 1 if parameters are not stacked."""
    if min(map(len, shapes)) < 2 or len({shape[0] for shape in shapes}) > 1:
        return 1
    behind = itertools.pairwise(shapes)
    has_biases = any(len(a) > 2 and b == a[:2] for a, b in behind)
    return shapes[0][0] if has_biases else 1


def _side_by_side(spec: NetSpec, members: int) -> NetSpec:
    """Return the specification of stacked networks, given that of one of them."""
    return NetSpec(
        names=spec.names,
        shapes=tuple((members, *shape) for shape in spec.shapes),
        neurons=tuple(replace(n, size=members * n.size) for n in spec.neurons),
        kernels=tuple(replace(k, grid=(members * k.grid[0], *k.grid[1:])) for k in spec.kernels),
        biases=tuple(
            replace(b, start=member * b.size, neurons_start=member * b.size)
            for b in spec.biases
            for member in range(members)
        ),
        loose=spec.loose,
    )


def _by_order(shapes: Sequence[tuple[int, ...]]) -> list[Layer]:
    """Group parameters into layers by order and shapes."""
    layers, i = [], 0
    while i < len(shapes):
        if len(shapes[i]) < 2:
            i += 1
            continue
        behind = [j for j in range(i + 1, len(shapes)) if shapes[j] != shapes[i][:1]]
        stop = behind[0] if behind else len(shapes)
        vectors = list(range(i + 1, stop))
        bias = vectors.pop(0) if len(vectors) % 2 else None
        layers.append(Layer(i, bias, False))
        layers += [Layer(a, b, True) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        i = stop
    return layers


def _by_name(shapes: Sequence[tuple[int, ...]], names: Sequence[str]) -> list[Layer]:
    """Group parameters into layers by prefixes of their names."""
    together: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        together.setdefault(_prefix(name), []).append(i)
    layers = []
    for own in together.values():
        kernels = [i for i in own if len(shapes[i]) > 1]
        vectors = [i for i in own if len(shapes[i]) == 1]
        if kernels:
            fits = [i for i in vectors if shapes[i] == shapes[kernels[0]][:1]]
            layers.append(Layer(kernels[0], fits[0] if fits else None, False))
            layers += [Layer(i, None, False) for i in kernels[1:]]
        elif len(vectors) in (1, 2) and shapes[vectors[0]] == shapes[vectors[-1]]:
            bias = vectors[1] if len(vectors) == 2 else None
            if names[vectors[0]].rpartition(".")[2] == "weight":
                layers.append(Layer(vectors[0], bias, True))
    return sorted(layers, key=lambda layer: layer.weight)


def _prefix(name: str) -> str:
    return name.rpartition(".")[0]


def _chain(
    names: Sequence[str], shapes: Sequence[tuple[int, ...]], layers: Sequence[Layer]
) -> NetSpec:
    """Return the specification of a chain of layers.

    A kernel that does not fit the output of the previous layer reads a new hidden set of unknown
    origin. This may add a symmetry that the network lacks, but never removes one. A norm that does
    not fit is omitted.
    """
    sets: list[tuple[str, int, int]] = []  # name, size, number of kernels before it
    kernels: list[Kernel] = []
    biases: list[Bias] = []
    for layer in layers:
        i, shape, last = layer.weight, shapes[layer.weight], len(sets) - 1
        name = _prefix(names[i]) or names[i]
        if layer.is_norm:
            if not sets or shape != (sets[last][1],):
                continue
            sets.append((name, *sets[last][1:]))
            kernels.append(Kernel(i, last, last + 1, (shape[0], 1, 1), kind="norm"))
        else:
            if 0 in shape:  # no edges
                continue
            positions = _positions(shape, sets[last][1] if sets else None, kernels)
            if positions is None:
                depth = sets[last][2] + 1 if sets else 0
                sets.append((f"before {names[i]}", shape[1], depth))
                last, positions = last + 1, shape[2:]
            sets.append((name, shape[0], sets[last][2] + 1))
            grid = (1, shape[0], math.prod(shape[1:]) // math.prod(positions))
            kernels.append(Kernel(i, last, last + 1, grid, positions))
        if layer.bias is not None and shapes[layer.bias] == (sets[-1][1],):
            biases.append(Bias(layer.bias, len(sets) - 1, sets[-1][1]))
    placed = {kernel.parameter for kernel in kernels} | {bias.parameter for bias in biases}
    neurons = [Neurons(name, size, "hidden", depth - 1) for name, size, depth in sets]
    if neurons:
        neurons[-1] = Neurons("output", sets[-1][1], "output", 0)
        neurons[0] = Neurons("input", sets[0][1], "input", 0)
    return NetSpec(
        names=tuple(names),
        shapes=tuple(shapes),
        neurons=tuple(neurons),
        kernels=tuple(kernels),
        biases=tuple(biases),
        loose=tuple(i for i in range(len(shapes)) if i not in placed),
    )


def _positions(
    shape: tuple[int, ...], size: int | None, kernels: Sequence[Kernel]
) -> tuple[int, ...] | None:
    """Return the positions of a kernel that reads a set of ``size``; None if it does not fit."""
    if shape[1] == size:
        return shape[2:]
    # Linear layer after a flattened feature map: the pixels of a channel are adjacent, so that
    # [out, C * pixels] is a view of [out, C, pixels].
    before = [kernel for kernel in kernels if kernel.kind != "norm"]
    after_convolution = bool(before) and len(before[-1].positions) > 0
    if size and after_convolution and len(shape) == 2 and shape[1] % size == 0:
        pixels = shape[1] // size
        side = math.isqrt(pixels)
        return (side, side) if side * side == pixels else (pixels,)
    return None
