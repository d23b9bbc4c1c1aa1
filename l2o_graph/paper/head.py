"""Node and edge states -> two numbers for each parameter: a direction and a magnitude."""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.spans import Scalars
from l2o_graph.paper.features import NUM_FEATURES


class PaperHead(nn.Module):
    """The paper's head: ``layers`` hidden layers on 14 features and a copy of the cell's state."""

    def __init__(self, context: int = 64, hidden: int = 64, layers: int = 8):
        super().__init__()
        widths = [NUM_FEATURES + context, *[hidden] * layers]
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            parts += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*parts, nn.Linear(hidden, 2))

    def forward(
        self, scalars: Scalars, context: Float[Tensor, "cells H"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Direction and magnitude of each scalar."""
        copies, cell = [], 0
        for part in scalars.parts:
            positions = math.prod(part.positions)
            cells = (part.stop - part.start) // positions
            copies.append(context[cell : cell + cells].repeat_interleave(positions, dim=0))
            cell += cells
        features = torch.cat([scalars.x.T, torch.cat(copies)], dim=1)
        direction, magnitude = self.layers(features).T
        return direction, magnitude
