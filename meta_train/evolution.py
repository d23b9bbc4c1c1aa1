"""Evolution strategies over a controller's weights, from spans of courses that go on.

Each instance of a course has a perturbation e of its own. One of its networks is trained by
w + s e, the other by w - s e, and half the difference of their scores, times e, is an estimate of
the gradient. A perturbation is kept for as long as a course lasts and each span gives an estimate:
persistent evolution strategies with reused noise, unbiased for the whole course (Vicol et al. 2021;
Li et al. 2023, who show that reuse has the least variance).
"""

import torch
from torch import Tensor

# A pair counts at most so many times the mean of all.
MOST_DIFFERENCE = 3.0


def perturbations(seed: int, pairs: int, size: int) -> Tensor:
    """Noise of a course, (P, size), determined by its seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(pairs, size, generator=generator)


def perturbed(weights: Tensor, noise: Tensor, deviation: float) -> Tensor:
    """Weights of both networks of each pair, in turn: (size,), (P, size) -> (2P, size)."""
    both = torch.stack([noise, -noise], 1).flatten(0, 1)
    return weights + deviation * both


def gradient(scores: Tensor, noise: Tensor) -> tuple[Tensor, float]:
    """Estimate which way scores rise: (2P,), of both of each pair in turn, (P, size) -> (size,).

    It is in units of the mean difference, clipped; with it comes that mean.
    """
    difference = (scores[0::2] - scores[1::2]) / 2
    mean = float(difference.abs().mean())
    normal = (difference / max(mean, 1e-12)).clamp(-MOST_DIFFERENCE, MOST_DIFFERENCE)
    return (normal[:, None] * noise).mean(0), mean
