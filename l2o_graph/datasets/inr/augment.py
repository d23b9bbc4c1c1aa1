"""Data augmentation of INRs that preserves their class (Navon et al. 2023, appendix).

Translation, rotation, scale, shear and mirroring transform the image: a network f with first
weights W_1 A and biases b_1 + W_1 t instead of W_1 and b_1 represents f(A x + t). Noise and dropout
act on the parameters. All transformations are drawn independently for each network.

Differences from the released code (AvivNavon/DWSNets): its noise is a constant, not random. It
rescales weights that are not dropped by 1 / (1 - rate), so that networks in training have larger
weights than those in tests; here they are not rescaled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from l2o_graph.datasets.inr.siren import layout_of

# As published: noise relative to the standard deviation of a tensor, and dropout rate.
NOISE = 0.1
DROPOUT = 0.01


@dataclass(frozen=True, slots=True)
class Amounts:
    """Largest amounts of data augmentation.

    Attributes:
        translation: Shift along each axis, in coordinates from -1 to 1.
        deep: Whether translations act at a random hidden layer instead of the first. They are
            exact only at the first.
        rotation: Angle in degrees, in both directions.
        scale: Relative change of size.
        stretch: Relative change of size of each axis, independently.
        shear: Fraction of y that is added to x.
        mirrored: Whether half of the images are mirrored horizontally.
        noise: Standard deviation of the noise, relative to that of a tensor.
        dropout: Fraction of parameters that are set to 0.
    """

    translation: float
    deep: bool = False
    rotation: float = 0.0
    scale: float = 0.0
    stretch: float = 0.0
    shear: float = 0.0
    mirrored: bool = False
    noise: float = 0.0
    dropout: float = 0.0


_SMALL = Amounts(0.1, rotation=15.0, stretch=0.12, shear=0.15)
AMOUNTS = {
    "published": Amounts(0.25, deep=True, rotation=45.0, scale=0.2, noise=NOISE, dropout=DROPOUT),
    "small": _SMALL,
    "small-mirrored": replace(_SMALL, mirrored=True),
    "mirrored": Amounts(0.04, rotation=4.0, stretch=0.05, shear=0.04, mirrored=True),
}
"""Amounts by name: "published" by Navon et al. 2023 in their code, "small" for digits,
"small-mirrored" and "mirrored" for photographs and clothes."""


def augmented(
    weights: Sequence[Float[Tensor, "I _ _"]],
    biases: Sequence[Float[Tensor, "I _"]],
    generator: torch.Generator,
    amounts: Amounts = AMOUNTS["published"],
) -> tuple[tuple[Float[Tensor, "I _ _"], ...], tuple[Float[Tensor, "I _"], ...]]:
    """Augment networks by random transformations.

    Args:
        weights: Weights of each layer, (I, out, in), not normalised.
        biases: Biases of each layer, (I, out).
        generator: Random number generator, on any device.
        amounts: Amounts of augmentation.

    Returns:
        Weights and biases in new tensors of the same shapes.

    Raises:
        ValueError: For tensors that do not form networks with two inputs and a hidden layer.
    """
    layout = layout_of(weights, biases)
    if layout[0] != 2 or len(weights) < 2:
        raise ValueError(
            "augmentation: expected networks with 2 inputs and a hidden layer, found layout "
            f"{layout}"
        )
    like, count = weights[0], len(weights[0])
    shift = amounts.translation * _between_ones(generator, like, count, 2)
    depth = torch.ones(count, dtype=torch.long, device=like.device)
    if amounts.deep:
        depth = torch.randint(
            1, len(weights), (count,), generator=generator, device=generator.device
        ).to(like.device)
    angle = math.radians(amounts.rotation) * _between_ones(generator, like, count)
    factor = 1 + amounts.scale * _between_ones(generator, like, count)
    moved = translated(weights, biases, shift, depth)
    first = factor[:, None, None] * rotated(weights[0], angle)
    if amounts.stretch or amounts.shear or amounts.mirrored:
        first = first @ _frame(amounts, generator, like, count)
    networks = [first, *weights[1:], *moved]
    if amounts.noise:
        networks = [noisy(t, amounts.noise, generator) for t in networks]
    if amounts.dropout:
        networks = [dropped(t, amounts.dropout, generator) for t in networks]
    return tuple(networks[: len(weights)]), tuple(networks[len(weights) :])


def _frame(
    amounts: Amounts, generator: torch.Generator, like: Tensor, count: int
) -> Float[Tensor, "I 2 2"]:
    """Draw matrices A that stretch, shear and mirror."""
    stretch = 1 + amounts.stretch * _between_ones(generator, like, count, 2)
    shear = amounts.shear * _between_ones(generator, like, count)
    mirror = _between_ones(generator, like, count)
    sign = torch.where(mirror < 0, -1.0, 1.0) if amounts.mirrored else torch.ones_like(mirror)
    x = torch.stack([sign * stretch[:, 0], shear], 1)
    y = torch.stack([torch.zeros_like(shear), stretch[:, 1]], 1)
    return torch.stack([x, y], 1)


def translated(
    weights: Sequence[Float[Tensor, "I _ _"]],
    biases: Sequence[Float[Tensor, "I _"]],
    shift: Float[Tensor, "I inputs"],
    depth: Int64[Tensor, " I"],
) -> tuple[Float[Tensor, "I _"], ...]:
    """Compute biases b_k + W_k ... W_1 t of networks that are translated by shifts t.

    ``depth`` is the layer k of each network at which the shift acts, from 1. Layer 1 gives exactly
    f(x + t); at deeper layers this is approximate, as they are not linear in t.
    """
    moved = []
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        shift = (weight @ shift[..., None])[..., 0]
        moved.append(torch.where((depth == k)[:, None], bias + shift, bias))
    return tuple(moved)


def rotated(weight: Float[Tensor, "I _ 2"], angle: Float[Tensor, " I"]) -> Float[Tensor, "I _ 2"]:
    """Compute first weights W_1 R of networks whose inputs are rotated.

    Angles are in radians, from the first axis towards the second.
    """
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return weight @ rotation


def noisy(
    x: Float[Tensor, "I ..."], share: float, generator: torch.Generator
) -> Float[Tensor, "I ..."]:
    """Add normal noise to a tensor of each network, unless it has a single scalar per network.

    ``share`` is the standard deviation of the noise, relative to that of the network's entries.
    """
    if x[:1].numel() < 2:
        return x
    noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    deviation = x.flatten(1).std(1).view(-1, *[1] * (x.dim() - 1))
    return x + share * deviation * noise.to(x.device)


def dropped(
    x: Float[Tensor, "I ..."], rate: float, generator: torch.Generator
) -> Float[Tensor, "I ..."]:
    """Set entries to 0, each with probability ``rate``."""
    kept = torch.rand(x.shape, generator=generator, device=generator.device) >= rate
    return x * kept.to(x)


def _between_ones(generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    """Draw uniform numbers from -1 to 1, with the dtype and device of ``like``."""
    draw = torch.rand(shape, generator=generator, device=generator.device, dtype=like.dtype)
    return (2 * draw - 1).to(like.device)
