"""SIRENs (Sitzmann et al. 2020) that represent one image each: initialisation and evaluation.

Hidden layers compute sin(omega0 (W x + b)) of a point x, the last layer W x + b + 0.5. Weights have
torch's layout, (out, in), with the networks of a set along a first axis, (I, out, in).

Layers, coordinates and the offset of 0.5 are those of DWSNets (Navon et al. 2023; nn/inr.py and
experiments/utils.py of AvivNavon/DWSNets), so that published networks give their images.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2o_graph.tracing.checks import check_module, check_parameter

LAYOUT = (2, 32, 32, 1)  # layer widths for grey images; C outputs for C channels
OMEGA0 = 30.0
OFFSET = 0.5

# ``evaluate`` processes this number of networks at a time, and pads the number of points to a
# multiple of ALIGNMENT, so that all matrix products have the same shape and alignment.
BLOCK = 64
ALIGNMENT = 16

Output = Literal["sine", "linear"]


def coordinates(
    height: int = 28, width: int = 28, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "2 Q"]:
    """Return the coordinates of all pixels, row by row.

    Args:
        height: Number of rows.
        width: Number of columns.
        dtype: Dtype of the result.

    Returns:
        x and y of the Q = height * width points, (2, Q), from -1 to 1.

    Examples:
        >>> coordinates(2, 3)
        tensor([[-1.,  0.,  1., -1.,  0.,  1.],
                [-1., -1., -1.,  1.,  1.,  1.]])
    """
    # Rounded once, as for the published networks.
    x, y = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (width, height))
    return torch.stack([x.repeat(height), y.repeat_interleave(width)]).to(dtype)


def initialise(
    generators: Sequence[torch.Generator],
    layout: Sequence[int] = LAYOUT,
    omega0: float = OMEGA0,
    output: Output = "sine",
) -> tuple[list[Float[Tensor, "I _ _"]], list[Float[Tensor, "I _"]]]:
    """Draw initial weights and biases, in float32 on the CPU.

    Weights of all sine layers, including the first, are uniform within ±sqrt(6 / fan-in) / omega0,
    and biases are 0.

    Args:
        generators: Random number generator of each of the I networks.
        layout: Layer widths, from the two coordinates to the channels of an image.
        omega0: Frequency factor of the sines.
        output: Initialisation of the last layer: "sine" like the others, or "linear" like
            ``nn.Linear``, weights and biases uniform within ±1 / sqrt(fan-in). DWSNets has
            "linear": in its published networks, the last weights and biases have standard
            deviations of 0.118 and 0.100, while those of "sine" start at 0.008 and 0.

    Returns:
        Weights (I, out, in) and biases (I, out) of each layer.

    Source:
        Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions",
        2020; the first layer as in Navon et al. 2023.
    """
    weights, biases = [], []
    for i, (fan_in, fan_out) in enumerate(pairwise(layout)):
        linear = output == "linear" and i == len(layout) - 2
        bound = 1 / math.sqrt(fan_in) if linear else math.sqrt(6 / fan_in) / omega0
        weights.append(bound * _uniform(generators, fan_out, fan_in))
        zeros = torch.zeros(len(generators), fan_out)
        biases.append(bound * _uniform(generators, fan_out) if linear else zeros)
    return weights, biases


def layout_of(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the layer widths of networks with weights (I, out, in) and biases (I, out).

    Raises:
        ValueError: For tensors that do not form networks, naming the layer.
    """
    if not weights or len(weights) != len(biases):
        raise ValueError(
            "INRs: expected a weight and a bias for each layer, found "
            f"{len(weights)} weights and {len(biases)} biases"
        )
    count, layout = len(weights[0]), [weights[0].shape[-1]]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        out = weight.shape[1] if weight.dim() == 3 else -1
        if weight.shape != (count, out, layout[-1]) or bias.shape != (count, out):
            raise ValueError(
                f"INRs, layer {i}: expected a weight ({count}, out, {layout[-1]}) and a bias "
                f"({count}, out), found {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        layout.append(out)
    return tuple(layout)


def stack_networks(
    networks: Sequence[nn.Module],
) -> tuple[list[Float[Tensor, "I _ _"]], list[Float[Tensor, "I _"]]]:
    """Stack weights and biases of torch modules, for models and ``render``.

    ``render`` gives the images of the modules only if these compute the formula at the top of this
    file. For a module without the offset of 0.5, subtract 0.5 from its last bias.

    Args:
        networks: I networks of one layout, with a weight and a bias for each layer, in order.

    Returns:
        Weights (I, out, in) and biases (I, out) of each layer, as detached copies.

    Raises:
        ValueError: For networks with other parameters, and networks of different layouts.
        TypeError: For anything but modules, and for TorchScript modules.

    Examples:
        >>> sirens = [nn.Sequential(nn.Linear(2, 32), nn.Linear(32, 1)) for _ in range(5)]
        >>> weights, biases = stack_networks(sirens)
        >>> [tuple(w.shape) for w in weights], [tuple(b.shape) for b in biases]
        ([(5, 32, 2), (5, 1, 32)], [(5, 32), (5, 1)])
    """
    found = []
    for i, network in enumerate(networks):
        check_module(network, f"INR {i}")
        parameters = dict(network.named_parameters())
        for name, p in parameters.items():
            check_parameter(p, f"INR {i}, parameter '{name}'")
        axes = [p.dim() for p in parameters.values()]
        if not axes or axes != [2, 1] * (len(axes) // 2):
            shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in parameters.items())
            raise ValueError(
                f"INR {i}: expected parameters (out, in) and (out,) in turn, found "
                f"{shapes or 'none'}"
            )
        found.append([p.detach() for p in parameters.values()])
    layouts = {tuple(p.shape for p in each) for each in found}
    if len(layouts) != 1:
        raise ValueError(f"INRs: expected one layout, found {len(layouts)}: {sorted(layouts)}")
    stacked = [torch.stack(each) for each in zip(*found, strict=True)]
    return stacked[::2], stacked[1::2]


def evaluate(
    weights: Sequence[Float[Tensor, "I _ _"]],
    biases: Sequence[Float[Tensor, "I _"]],
    points: Float[Tensor, "2 Q"],
    omega0: float = OMEGA0,
) -> Float[Tensor, "I C Q"]:
    """Evaluate networks at points that are the same for all; differentiable.

    The result for a network is bit-identical for any set of networks and any position in it, given
    the same device, dtype and version of torch, because matrix products are of blocks of one size
    and alignment. Plain batched products differ if the number of points is not a multiple of 16.

    Args:
        weights: Weights of each layer, (I, out, in).
        biases: Biases of each layer, (I, out).
        points: Points (x, y), (2, Q).
        omega0: Frequency factor of the sines.

    Returns:
        Outputs of each network at each point, (I, C, Q).

    Raises:
        ValueError: For tensors that do not form networks with two inputs.
    """
    layout = layout_of(weights, biases)
    if layout[0] != len(points):
        raise ValueError(f"INRs: expected {len(points)} inputs, found layout {layout}")
    count = points.shape[1]
    padded = F.pad(points.to(weights[0]), (0, -count % ALIGNMENT))
    outputs = [weights[0].new_zeros(0, layout[-1], count)]
    for start in range(0, len(weights[0]), BLOCK):
        stop = min(start + BLOCK, len(weights[0]))
        hidden = padded.expand(BLOCK, -1, -1)
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            w, b = _block(weight[start:stop]), _block(bias[start:stop])[..., None]
            if i == len(weights) - 1:
                hidden = torch.baddbmm(b, w, hidden) + OFFSET
            else:
                hidden = torch.baddbmm(b, w, hidden, beta=omega0, alpha=omega0).sin()
        outputs.append(hidden[: stop - start, :, :count])
    return torch.cat(outputs)


def responses(
    weights: Sequence[Float[Tensor, "I _ _"]],
    biases: Sequence[Float[Tensor, "I _"]],
    points: Float[Tensor, "C Q"],
    omega0: float = OMEGA0,
) -> list[Float[Tensor, "I _ Q"]]:
    """Compute the activations of all neurons at points; also differentiable in the points.

    Returns the points, (I, C, Q), then the activations of each layer, (I, out, Q). Without the
    blocks of ``evaluate``, outputs are equal to its result only up to rounding.
    """
    layers = [points.expand(len(weights[0]), -1, -1)]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        linear = torch.baddbmm(bias[..., None], weight, layers[-1])
        layers.append(linear + OFFSET if i == len(weights) - 1 else (omega0 * linear).sin())
    return layers


def render(
    weights: Sequence[Float[Tensor, "I _ _"]],
    biases: Sequence[Float[Tensor, "I _"]],
    size: tuple[int, int] = (28, 28),
    omega0: float = OMEGA0,
) -> Float[Tensor, "I *C height width"]:
    """Render the images that networks represent.

    Args:
        weights: Weights of each layer, (I, out, in).
        biases: Biases of each layer, (I, out).
        size: Height and width in pixels.
        omega0: Frequency factor of the sines.

    Returns:
        Images (I, height, width), or (I, C, height, width) for several outputs, about from 0 to 1,
        not clipped.

    Raises:
        ValueError: For tensors that do not form networks with two inputs.
    """
    points = coordinates(*size, dtype=weights[0].dtype)
    return evaluate(weights, biases, points, omega0).unflatten(2, size).squeeze(1)


def psnr(
    pixels: Float[Tensor, "I *C height width"], images: Float[Tensor, "I *C height width"]
) -> Float[Tensor, " I"]:
    """Compute peak signal-to-noise ratios, for a peak of 1.

    Args:
        pixels: Rendered images, (I, height, width) or (I, C, height, width).
        images: Original images, of the same shape.

    Returns:
        -10 log10 of each image's mean squared error over pixels and channels, in dB, (I,).
    """
    return -10 * (pixels - images).square().mean(tuple(range(1, pixels.dim()))).log10()


def _uniform(generators: Sequence[torch.Generator], *shape: int) -> Tensor:
    """Draw uniform numbers from -1 to 1 by each generator, (I, *shape)."""
    return 2 * torch.stack([torch.rand(shape, generator=g) for g in generators]) - 1


def _block(part: Tensor) -> Tensor:
    """Copy into a block, padded with zeros."""
    block = part.new_zeros(BLOCK, *part.shape[1:])
    block[: len(part)] = part
    return block
