"""Numbers -> features in which a linear map can tell small differences (Tancik et al. 2020)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

FREQUENCIES = 128
ALONE = ((1.0,),)


class FourierFeatures(nn.Module):
    """[cos(2 pi B x); sin(2 pi B x)] of vectors x, with B drawn once from N(0, sigma^2).

    Args:
        inputs: Entries of a vector.
        sigma: Deviation of the frequencies; with 0 the features are the vector itself.
        count: Number of frequencies.
    """

    frequencies: Tensor | None

    def __init__(self, inputs: int, sigma: float, count: int = FREQUENCIES):
        super().__init__()
        drawn = sigma * torch.randn(count, inputs) if sigma else None
        self.register_buffer("frequencies", drawn)
        self.size = 2 * count if sigma else inputs

    def forward(
        self, x: Float[Tensor, "*B n"], ways: Sequence[Sequence[float]] = ALONE
    ) -> Float[Tensor, "*B W n size"]:
        """Features of the vectors x * way, for each number x and each of W ways."""
        ways_of_x = x.new_tensor(ways)
        if self.frequencies is None:
            return x[..., None, :, None] * ways_of_x[:, None]
        turns = 2 * math.pi * (ways_of_x @ self.frequencies.T)
        turns = turns.repeat(1, 2)[:, None]
        return torch.addcmul(_quarter_turns(turns, self.size), x[..., None, :, None], turns).sin_()

    def of(self, x: Float[Tensor, "*n inputs"]) -> Float[Tensor, "*n size"]:
        """Features of vectors x."""
        if self.frequencies is None:
            return x
        turns = (2 * math.pi * self.frequencies).repeat(2, 1)
        return nn.functional.linear(x, turns, _quarter_turns(turns, self.size)).sin_()


def _quarter_turns(like: Tensor, size: int) -> Float[Tensor, " size"]:
    """A cosine is a sine a quarter turn ahead: all features are one operation."""
    return like.new_tensor([math.pi / 2, 0.0]).repeat_interleave(size // 2)


def chained(
    first: nn.Linear, second: nn.Linear, x: Float[Tensor, "*n inputs"]
) -> Float[Tensor, "*n outputs"]:
    """Two linear maps with nothing between them, as one: half the work and no state between."""
    weight = second.weight @ first.weight
    return nn.functional.linear(x, weight, second(first.bias))
