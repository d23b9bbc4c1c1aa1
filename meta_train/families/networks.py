"""Small networks that several families train."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: tuple[Activation, ...] = (F.relu, F.gelu, torch.tanh, F.silu)


class MLP(nn.Module):
    """Linear layers of these sizes, inputs to outputs, with an activation in between.

    With ``norm`` there is a LayerNorm in front of each activation.
    """

    def __init__(self, sizes: Sequence[int], activation: Activation, norm: bool = False):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norm = nn.ModuleList(nn.LayerNorm(n) for n in sizes[1:-1] if norm)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] -> [B, outputs]."""
        for i, linear in enumerate(self.linear[:-1]):
            x = linear(x)
            if self.norm:
                x = self.norm[i](x)
            x = self.activation(x)
        return self.linear[-1](x)
