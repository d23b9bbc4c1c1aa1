"""Fit one SIREN to each of many images: batched products, gradients by hand, Adam on all at once.

The chain rule of a SIREN is a dozen lines, and steps by it take 0.6 to 0.7 of the time of steps
through autograd, which asks for memory anew each time and works out each cosine apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph.datasets.inr.siren import (
    ALIGNMENT,
    OFFSET,
    OMEGA0,
    Output,
    coordinates,
    layout_of,
)
from l2o_graph.ranges import COUNT, POSITIVE, SHARE, SHARE_BELOW_ONE, check_ranges

# Part of the steps, at the end, that see all pixels.
WHOLE = 0.1


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is fitted: Adam on the mean squared error of its pixels, over all channels.

    Attributes:
        steps: Number of steps of Adam.
        lr: Learning rate of Adam.
        betas: Decay rates of Adam.
        tail: Fraction of the steps, at the end, over which the rate falls to 0 on a straight line.
        grids: Number of interleaved grids of pixels, of which a step sees one, by turns; in the
            last tenth of the steps, and with 1 always, all pixels.
        stop: PSNR in dB at which a network is finished early; None to never stop.
        output: How the last layer is drawn; see ``siren.initialise``.
    """

    steps: int
    lr: float
    betas: tuple[float, float]
    tail: float = 0.0
    grids: int = 1
    stop: float | None = None
    output: Output = "sine"

    def __post_init__(self) -> None:
        check_ranges(self, steps=COUNT, lr=POSITIVE, tail=SHARE, grids=COUNT)
        for beta in self.betas:
            SHARE_BELOW_ONE.check("betas", beta)

    def rate(self, step: int) -> float:
        """Give the learning rate of a step, counted from 0."""
        falling = self.tail * self.steps
        return self.lr * min(1.0, (self.steps - step) / falling) if falling else self.lr

    def sees_all(self, step: int) -> bool:
        """Whether a step sees all pixels."""
        return self.grids == 1 or step >= (1 - WHOLE) * self.steps


RECIPES = {
    # Medians of 30.4 dB on MNIST and 29.3 on Fashion-MNIST, in two thirds of the time of 1,000
    # steps on all pixels, which are worth 0.8 dB more: neighbours say much the same. Of four grids
    # one sees too little. A shorter memory of the squares, 0.95, is worth 0.7 dB. Rates of 1e-2 and
    # up fit better still, but throw the weights far from where they started.
    "default": Recipe(steps=1100, lr=2e-3, betas=(0.9, 0.95), tail=0.25, grids=2),
    # What the authors of DWSNets say of theirs (issue 6 of AvivNavon/DWSNets).
    "published": Recipe(1000, lr=5e-4, betas=(0.9, 0.999), stop=40.0, output="linear"),
}
"""Recipes by name: the default one, and that of the published networks."""


def fit(
    images: Float[Tensor, "_ *C height width"],
    weights: Sequence[Float[Tensor, "I _ _"]],
    biases: Sequence[Float[Tensor, "I _"]],
    recipe: Recipe = RECIPES["default"],
    omega0: float = OMEGA0,
) -> tuple[list[Float[Tensor, "I _ _"]], list[Float[Tensor, "I _"]]]:
    """Fit networks to images, all at once.

    The default recipe takes 0.12 to 0.15 s a network on one core. A network comes out the same in
    any company: up to rounding, and bit for bit in batches of one size, on one device and with a
    number of pixels that 16 divides (else matrix products depend on the place in memory). Batches
    of 8 to 32 suit the cache of a CPU.

    Args:
        images: Images (I, height, width), or of C channels (I, C, height, width), in [0, 1], on the
            device and in the dtype to work in.
        weights: First weights of each layer, (I, out, in), on the same.
        biases: First biases of each layer, (I, out).
        recipe: How many steps of which size.
        omega0: Factor in every sine.

    Returns:
        Weights and biases in new tensors; they are not checked for being finite.

    Raises:
        ValueError: For tensors that do not make one network an image, with an output a channel.
    """
    layout = layout_of(weights, biases)
    channels = layout[-1:] if layout[-1] > 1 else ()
    expected = (len(weights[0]), *channels, *images.shape[-2:])
    if layout[0] != 2 or images.shape != expected:
        raise ValueError(
            "fit: expected images (I, height, width), or (I, C, height, width) with C > 1, and as "
            f"many networks of layout (2, ..., C), found images {tuple(images.shape)} and "
            f"{len(weights[0])} networks of layout {layout}"
        )
    start = [t for pair in zip(weights, biases, strict=True) for t in pair]
    size = sum(t.numel() for t in start)
    values, gradient, mean, square, scratch = images.new_zeros(5, size).unbind()
    parameters, gradients = _parts(values, start), _parts(gradient, start)
    for part, first in zip(parameters, start, strict=True):
        part.copy_(first)
    finished = [p.clone() for p in parameters]
    running = torch.ones(len(images), dtype=torch.bool, device=images.device)
    seen = _views(layout, images, recipe.grids)
    beta1, beta2 = recipe.betas
    for step in range(recipe.steps):
        view = seen[0] if recipe.sees_all(step) else seen[1 + step % recipe.grids]
        loss = _backward(parameters, gradients, omega0, view)
        if recipe.stop is not None:
            reached = running & (loss <= 10 ** (-recipe.stop / 10))
            _keep(finished, parameters, reached)
            running &= ~reached
            if not bool(running.any()):
                break
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        torch.sqrt(square, out=scratch)
        scratch.div_((1 - beta2 ** (step + 1)) ** 0.5).add_(1e-8)
        values.addcdiv_(mean, scratch, value=-recipe.rate(step) / (1 - beta1 ** (step + 1)))
    _keep(finished, parameters, running)
    return finished[::2], finished[1::2]


class _View:
    """Pixels that a step sees, and its memory; asking for that anew costs up to a step's time."""

    def __init__(self, layout: Sequence[int], points: Tensor, target: Tensor):
        self.points = points.contiguous()  # places of Q pixels, (2, Q)
        self.target = target.contiguous()  # what each of I networks is to say there, (I, C, Q)
        shapes = [(len(target), width, points.shape[1]) for width in layout[1:]]
        self.hidden = [points.new_empty(shape) for shape in shapes[:-1]]  # sines
        self.slopes = [points.new_empty(shape) for shape in shapes[:-1]]  # their derivatives
        self.error = points.new_empty(shapes[-1])  # of the output


def _views(
    layout: Sequence[int], images: Float[Tensor, "I *C height width"], grids: int
) -> list[_View]:
    """All pixels; and if there are several grids, those of each."""
    height, width = images.shape[-2:]
    points = coordinates(height, width, dtype=images.dtype).to(images.device)
    target = images.reshape(len(images), layout[-1], height * width) - OFFSET
    views = [_View(layout, points, target)]
    grid = (torch.arange(height)[:, None] + torch.arange(width)).flatten() % grids
    for number in range(grids if grids > 1 else 0):
        index = (grid == number).nonzero().flatten()
        # Filled up with some of the same: see ``ALIGNMENT``.
        index = torch.cat([index, index[: -len(index) % ALIGNMENT]]).to(images.device)
        views.append(_View(layout, points[:, index], target[..., index]))
    return views


def _backward(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], omega0: float, view: _View
) -> Float[Tensor, " I"]:
    """Write the gradients of each network's mean squared error; returns the errors."""
    weights, biases = parameters[::2], parameters[1::2]
    inputs = [view.points.expand(len(view.target), -1, -1), *view.hidden]
    for i, slope in enumerate(view.slopes):
        bias = biases[i][..., None]
        torch.baddbmm(bias, weights[i], inputs[i], beta=omega0, alpha=omega0, out=slope)
        torch.sin(slope, out=view.hidden[i])
        slope.cos_()
    torch.baddbmm(biases[-1][..., None], weights[-1], inputs[-1], out=view.error)
    view.error -= view.target
    loss = view.error.square().mean((1, 2))
    delta = view.error.mul_(2 / view.error.shape[1:].numel())
    for i in reversed(range(len(weights))):
        torch.bmm(delta, inputs[i].mT, out=gradients[2 * i])
        torch.sum(delta, 2, out=gradients[2 * i + 1])
        if i > 0:
            # What the layer read is no longer needed: its memory takes what flows back to it.
            torch.bmm((omega0 * weights[i]).mT, delta, out=view.hidden[i - 1])
            delta = view.slopes[i - 1].mul_(view.hidden[i - 1])
    return loss


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of one flat tensor, one for each of others and in its shape."""
    parts = flat.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


def _keep(kept: Sequence[Tensor], parameters: Sequence[Tensor], which: Tensor) -> None:
    """Copy the parameters of some networks."""
    for k, p in zip(kept, parameters, strict=True):
        k[which] = p[which]
