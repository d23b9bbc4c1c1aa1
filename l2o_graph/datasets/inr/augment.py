"""Random changes to INRs that leave their class what it was (Navon et al. 2023, appendix).

Translation, rotation, scale, shear and mirroring move the image: with first weights W_1 A and
biases b_1 + W_1 t, a network draws at x what it drew at A x + t. Noise and dropout disturb the
parameters. Everything is drawn anew for each network, and nothing is written in place.

Noise is what the release of AvivNavon/DWSNets meant; it adds a constant, because it forgets to
draw. Weights that survive dropout keep their values; the release's grow by 1 / (1 - rate), so that
it trains on other sizes than it is tested on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from l2o_graph.datasets.inr.siren import layout_of

NOISE = 0.1  # standard deviations of a tensor's entries, as published
DROPOUT = 0.01


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much networks are changed, at most.

    Attributes:
        translation: Shift along each axis; an image is 2 wide.
        deep: Whether translations act at a layer drawn at random instead of the first, where alone
            they are exact.
        rotation: Angle in degrees, either way.
        scale: Relative change of the size, up or down.
        stretch: The same for each axis by itself.
        shear: Part of y that is added to x.
        mirrored: Whether half of the images are mirrored, left to right.
        noise: Standard deviation of noise, relative to that of a tensor's entries.
        dropout: Fraction of the entries that are set to 0.
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
"""Amounts by name: those of the release of Navon et al. 2023, for digits, and two for clothes and
photographs."""

Networks = tuple[tuple[Float[Tensor, "I _ _"], ...], tuple[Float[Tensor, "I _"], ...]]


def augmented(
    weights: Sequence[Float[Tensor, "I _ _"]],
    biases: Sequence[Float[Tensor, "I _"]],
    generator: torch.Generator,
    amounts: Amounts = AMOUNTS["published"],
) -> Networks:
    """Change networks at random.

    Args:
        weights: Weights of each layer, (I, out, in), as they were fitted, not normalised.
        biases: Biases of each layer, (I, out).
        generator: Where the random numbers come from, on any device; the same gives the same.
        amounts: How much.

    Returns:
        Weights and biases in new tensors of the same shapes.

    Raises:
        ValueError: For tensors that do not make networks on two coordinates, with a hidden layer.
    """
    layout = layout_of(weights, biases)
    if layout[0] != 2 or len(weights) < 2:
        raise ValueError(
            "augmentation: expected networks on 2 coordinates with a hidden layer, found layout "
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
    first = scaled(rotated(weights[0], angle), factor)
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
    """Axes of the image of each network: stretched, sheared and mirrored."""
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
    """Biases of networks that see every point moved: b_k + W_k ... W_1 t.

    Each has a shift t, and draws at x what it drew at x + t; and a depth k, from 1. Only 1 is
    exact, as deeper layers are not linear in t.
    """
    answer = []
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        shift = (weight @ shift[..., None])[..., 0]
        answer.append(torch.where((depth == k)[:, None], bias + shift, bias))
    return tuple(answer)


def rotated(weight: Float[Tensor, "I _ 2"], angle: Float[Tensor, " I"]) -> Float[Tensor, "I _ 2"]:
    """First weights of networks that see every point turned: W_1 R.

    Angles are in radians, from the first axis towards the second.
    """
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return weight @ rotation


def scaled(weight: Float[Tensor, "I _ _"], factor: Float[Tensor, " I"]) -> Float[Tensor, "I _ _"]:
    """First weights of networks that see every point ``factor`` times as far from the centre."""
    return factor[:, None, None] * weight


def noisy(
    x: Float[Tensor, "I ..."], share: float, generator: torch.Generator
) -> Float[Tensor, "I ..."]:
    """A tensor of each network with normal noise; a single scalar a network stays as it is.

    ``share`` is the deviation of the noise, relative to that of the network's entries.
    """
    if x[:1].numel() < 2:
        return x
    noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    deviation = x.flatten(1).std(1).view(-1, *[1] * (x.dim() - 1))
    return x + share * deviation * noise.to(x.device)


def dropped(
    x: Float[Tensor, "I ..."], rate: float, generator: torch.Generator
) -> Float[Tensor, "I ..."]:
    """A tensor with a share ``rate`` of its entries, drawn one by one, set to 0."""
    kept = torch.rand(x.shape, generator=generator, device=generator.device) >= rate
    return x * kept.to(x)


def _between_ones(generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    """Uniform numbers from -1 to 1."""
    draw = torch.rand(shape, generator=generator, device=generator.device, dtype=like.dtype)
    return (2 * draw - 1).to(like.device)
