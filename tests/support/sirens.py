"""SIRENs that are drawn, one by one and pixel by pixel."""

import torch
from torch import nn

from l2o_graph.inr import initialise


class Siren(nn.Module):
    """The slow twin."""

    def __init__(self, weights, biases, omega0=30.0):
        super().__init__()
        self.omega0 = omega0
        self.layers = nn.ModuleList()
        for weight, bias in zip(weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.layers.append(layer)

    def forward(self, points):
        for layer in self.layers[:-1]:
            points = torch.sin(self.omega0 * layer(points))
        return self.layers[-1](points) + 0.5


def networks(count, layout=(2, 32, 32, 1), seed=0, dtype=torch.float32, output="linear"):
    """First weights and biases, by layer."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    weights, biases = initialise(generators, layout, output=output)
    return [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]


def single(parts, i):
    return [t[i] for t in parts]


def pixel_by_pixel(height, width):
    """Every point of the grid, written out."""
    return torch.tensor(
        [
            [-1 + 2 * column / (width - 1), -1 + 2 * row / (height - 1)]
            for row in range(height)
            for column in range(width)
        ],
        dtype=torch.float64,
    )
