"""SIRENs (Sitzmann et al. 2020) that each hold an image: their first weights, and what they draw.

A point (x, y) passes layers of sin(omega0 (W x + b)), then a linear one; 0.5 is added to what
comes out. Weights are as in torch, (out, in), with all networks of a set along a first axis.

The networks, the grid and the 0.5 are those of DWSNets (Navon et al. 2023; nn/inr.py and
experiments/utils.py of AvivNavon/DWSNets), so that published networks draw what they should.
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

LAYOUT = (2, 32, 32, 1)  # of grey images; those of C channels have C outputs
OMEGA0 = 30.0
OFFSET = 0.5

# Networks that are drawn in one go, and the points that their number is filled up to a multiple
# of: with these every matrix product has the same shape and alignment, whatever is drawn.
BLOCK = 64
ALIGNMENT = 16

Output = Literal["sine", "linear"]


def coordinates(
    height: int = 28, width: int = 28, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "2 Q"]:
    """List the points of all pixels, row by row.

    Args:
        height: Number of rows.
        width: Number of columns.
        dtype: Type of the answer.

    Returns:
        x and y of each of the Q = height * width points, (2, Q), each from -1 to 1.

    Examples:
        >>> coordinates(2, 3)
        tensor([[-1.,  0.,  1., -1.,  0.,  1.],
                [-1., -1., -1.,  1.,  1.,  1.]])
    """
    # Rounded once, like those that the published networks were fitted on.
    x, y = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (width, height))
    return torch.stack([x.repeat(height), y.repeat_interleave(width)]).to(dtype)


def initialise(
    generators: Sequence[torch.Generator],
    layout: Sequence[int] = LAYOUT,
    omega0: float = OMEGA0,
    output: Output = "sine",
) -> tuple[list[Float[Tensor, "I _ _"]], list[Float[Tensor, "I _"]]]:
    """Draw first weights and biases, in float32 on the CPU.

    Weights of sine layers are uniform within ±sqrt(6 / fan-in) / omega0, those of the first
    layer too, and biases are 0.

    Args:
        generators: A generator for each of the I networks, from which its random numbers come.
        layout: Widths, from the two coordinates to the channels of an image.
        omega0: Factor in every sine.
        output: The last layer is drawn like the others ("sine"), or it and its bias as torch
            draws a linear layer ("linear"): uniform within ±1 / sqrt(fan-in). The latter is what
            DWSNets does, and shows in the deviations of its published networks: 0.118 for the
            last weights, 0.100 for the last bias, which "sine" starts at 0.008 and 0.

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
    """Widths of networks of weights (I, out, in) and biases (I, out), from input to output.

    Raises:
        ValueError: Where the tensors do not make networks, naming the layer.
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
    """Stack weights and biases of networks that are torch modules, for models and ``render``.

    Whether they draw what these say depends on their formula: see the top of this module. A
    network whose output has no 0.5 added is told to take 0.5 off its last bias.

    Args:
        networks: I networks of one layout, with a weight and a bias for each layer, in order.

    Returns:
        Weights (I, out, in) and biases (I, out) of each layer, detached copies.

    Raises:
        ValueError: For networks of other parameters, with their number, and of several layouts.
        TypeError: For what is no module, and for one of TorchScript.

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
                f"INR {i}: expected parameters (out, in) and (out,) by turns, found "
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
    """Evaluate networks at points, the same for all of them; differentiable.

    One network gives the same bits alone, in any company and at any place in it, for one
    device, dtype and version of torch: networks are worked on in blocks of one size, from
    memory of one alignment. Plain batched products do not promise that, and break it where the
    number of points is not a multiple of 16.

    Args:
        weights: Weights of each layer, (I, out, in).
        biases: Biases of each layer, (I, out).
        points: Points (x, y), one a column, (2, Q).
        omega0: Factor in every sine.

    Returns:
        Values of the C outputs of each network at each point, (I, C, Q).

    Raises:
        ValueError: For tensors that do not make networks on two coordinates.
    """
    layout = layout_of(weights, biases)
    if layout[0] != len(points):
        raise ValueError(f"INRs: expected {len(points)} inputs, found layout {layout}")
    count = points.shape[1]
    padded = F.pad(points.to(weights[0]), (0, -count % ALIGNMENT))
    answers = [weights[0].new_zeros(0, layout[-1], count)]
    for start in range(0, len(weights[0]), BLOCK):
        stop = min(start + BLOCK, len(weights[0]))
        hidden = padded.expand(BLOCK, -1, -1)
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            w, b = _block(weight[start:stop]), _block(bias[start:stop])[..., None]
            if i == len(weights) - 1:
                hidden = torch.baddbmm(b, w, hidden) + OFFSET
            else:
                hidden = torch.baddbmm(b, w, hidden, beta=omega0, alpha=omega0).sin()
        answers.append(hidden[: stop - start, :, :count])
    return torch.cat(answers)


def responses(
    weights: Sequence[Float[Tensor, "I _ _"]],
    biases: Sequence[Float[Tensor, "I _"]],
    points: Float[Tensor, "C Q"],
    omega0: float = OMEGA0,
) -> list[Float[Tensor, "I _ Q"]]:
    """What every neuron says at points; differentiable, of the points too.

    These are the points, then what each layer says: sines, and at the output the image's channels.
    Without the blocks of ``evaluate``, and so the same only up to rounding.
    """
    answers = [points.expand(len(weights[0]), -1, -1)]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        linear = torch.baddbmm(bias[..., None], weight, answers[-1])
        answers.append(linear + OFFSET if i == len(weights) - 1 else (omega0 * linear).sin())
    return answers


def render(
    weights: Sequence[Float[Tensor, "I _ _"]],
    biases: Sequence[Float[Tensor, "I _"]],
    size: tuple[int, int] = (28, 28),
    omega0: float = OMEGA0,
) -> Float[Tensor, "I *C height width"]:
    """Draw the images that networks hold: grey by one output, in C channels by C outputs.

    Args:
        weights: Weights of each layer, (I, out, in).
        biases: Biases of each layer, (I, out).
        size: Height and width in pixels; any, as a network has no resolution.
        omega0: Factor in every sine.

    Returns:
        Images (I, height, width), or with several outputs (I, C, height, width), about 0 to 1, not
        clipped.

    Raises:
        ValueError: For tensors that do not make networks on two coordinates.
    """
    points = coordinates(*size, dtype=weights[0].dtype)
    return evaluate(weights, biases, points, omega0).unflatten(2, size).squeeze(1)


def psnr(
    pixels: Float[Tensor, "I *C height width"], images: Float[Tensor, "I *C height width"]
) -> Float[Tensor, " I"]:
    """Compute peak signal-to-noise ratios, for a peak of 1.

    Args:
        pixels: What networks draw, (I, height, width) or (I, C, height, width).
        images: What they should draw, likewise.

    Returns:
        -10 log10 of the mean squared error of each image, over pixels and channels, in dB, (I,).
    """
    return -10 * (pixels - images).square().mean(tuple(range(1, pixels.dim()))).log10()


def _uniform(generators: Sequence[torch.Generator], *shape: int) -> Tensor:
    """Numbers from -1 to 1, drawn by each generator for itself."""
    return 2 * torch.stack([torch.rand(shape, generator=g) for g in generators]) - 1


def _block(part: Tensor) -> Tensor:
    """A copy, filled up with zeros to a block."""
    block = part.new_zeros(BLOCK, *part.shape[1:])
    block[: len(part)] = part
    return block
