"""Random Fourier features, which resolve small differences of numbers (Tancik et al. 2020)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

FREQUENCIES = 128


class FourierFeatures(nn.Module):
    """[cos(2 pi B x); sin(2 pi B x)] of vectors x, with B drawn once from N(0, sigma^2).

    Args:
        inputs: Size of a vector.
        sigma: Standard deviation of the frequencies; with 0 the features are the vector itself.
        count: Number of frequencies.
    """

    frequencies: Tensor | None

    def __init__(self, inputs: int, sigma: float, count: int = FREQUENCIES):
        super().__init__()
        drawn = sigma * torch.randn(count, inputs) if sigma else None
        self.register_buffer("frequencies", drawn)
        self.size = 2 * count if sigma else inputs

    def forward(self, x: Float[Tensor, "*n inputs"]) -> Float[Tensor, "*n size"]:
        """Compute the features of vectors x."""
        if self.frequencies is None:
            return x
        turns = (2 * math.pi * self.frequencies).repeat(2, 1)
        # A cosine is a sine with a phase of a quarter turn, so one operation computes both.
        ahead = turns.new_tensor([math.pi / 2, 0.0]).repeat_interleave(self.size // 2)
        return nn.functional.linear(x, turns, ahead).sin_()


class Projection(nn.Module):
    """W_second W_first gamma(x), with gamma the Fourier features of x (Kofinas et al. 2024)."""

    def __init__(self, inputs: int, size: int, sigma: float):
        super().__init__()
        self.features = FourierFeatures(inputs, sigma)
        self.first = nn.Linear(self.features.size, size)
        self.second = nn.Linear(size, size)

    def forward(self, x: Float[Tensor, "*n inputs"]) -> Float[Tensor, "*n size"]:
        """Project vectors x; the two maps are fused, which halves the work and memory."""
        weight = self.second.weight @ self.first.weight
        return nn.functional.linear(self.features(x), weight, self.second(self.first.bias))


def read_both_ways(x: Float[Tensor, "*n K"]) -> list[Float[Tensor, "*n three_K"]]:
    """Return inputs of an edge with features x, [x, 0, x], and of its reverse, [0, x, x]."""
    nothing = torch.zeros_like(x)
    return [torch.cat([x, nothing, x], dim=-1), torch.cat([nothing, x, x], dim=-1)]
