"""Persistent evolution strategies over a controller's weights.

Each instance of a course has its own perturbation e. One of its networks is trained with w + s e,
the other with w - s e, and half the difference of their scores, times e, estimates the gradient.
The perturbation stays the same for the whole course, and each span gives an estimate: persistent
evolution strategies with reused noise, which are unbiased for the whole course (Vicol et al. 2021;
Li et al. 2023, who show that reuse has the least variance).
"""

import torch
from torch import Tensor

# Differences of pairs are clipped at this many times their mean size.
MOST_DIFFERENCE = 3.0


def perturbations(seed: int, pairs: int, size: int) -> Tensor:
    """Draw the perturbations of a course, (P, size), determined by its seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(pairs, size, generator=generator)


def perturbed(weights: Tensor, noise: Tensor, deviation: float) -> Tensor:
    """Perturb weights for both networks of each pair: (size,), (P, size) -> (2P, size)."""
    both = torch.stack([noise, -noise], 1).flatten(0, 1)
    return weights + deviation * both


def gradient(scores: Tensor, noise: Tensor) -> tuple[Tensor, float]:
    """Estimate the gradient of scores: (2P,), alternating within pairs, (P, size) -> (size,).

    Differences are divided by their mean size, which is returned, too, and clipped.
    """
    difference = (scores[0::2] - scores[1::2]) / 2
    mean = float(difference.abs().mean())
    normal = (difference / max(mean, 1e-12)).clamp(-MOST_DIFFERENCE, MOST_DIFFERENCE)
    return (normal[:, None] * noise).mean(0), mean
