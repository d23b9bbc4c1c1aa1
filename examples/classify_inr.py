"""Classify the digits that SIRENs represent, without rendering them.

    python examples/classify_inr.py

A SIREN is fitted to each of four digits by an ordinary training loop. The packaged classifier then
reads the networks, from their responses at 128 learned points. The digits are drawn as strokes, so
that no dataset is needed.

The classifier is for SIRENs of this layout and formula, however they were fitted.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from l2o_graph import INRClassifier
from l2o_graph.inr import coordinates, stack_networks

# Strokes of each digit through points (x, y) in [-1, 1]; y points downwards.
DIGITS = {
    0: [[(0.4 * math.sin(math.pi * i / 8), 0.6 * math.cos(math.pi * i / 8)) for i in range(17)]],
    1: [[(0.1, -0.65), (-0.1, 0.65)]],
    4: [[(-0.3, -0.55), (-0.35, 0.05), (0.35, 0.05)], [(0.3, -0.55), (0.2, 0.65)]],
    7: [[(-0.4, -0.5), (0.4, -0.5), (-0.05, 0.65)]],
}
PEN = 0.1  # radius of the pen


class Siren(nn.Module):
    """SIREN of two layers sin(30 (W x + b)) and a linear layer, plus 0.5."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 1)
        for layer in (self.first, self.second, self.last):
            bound = (6 / layer.in_features) ** 0.5 / 30
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        """Compute grey values at points, [Q, 2] -> [Q]."""
        hidden = torch.sin(30 * self.first(points))
        return self.last(torch.sin(30 * self.second(hidden))).squeeze(1) + 0.5


def draw(strokes: list[list[tuple[float, float]]]) -> Tensor:
    """Draw strokes with a round pen; return grey values (784,)."""
    points, distance = coordinates().T, torch.full((784,), torch.inf)
    for stroke in map(torch.tensor, strokes):
        for start, end in pairwise(stroke):
            segment = end - start
            along = ((points - start) @ segment / (segment @ segment)).clamp(0, 1)[:, None]
            distance = distance.minimum((points - start - along * segment).norm(dim=1))
    return ((PEN - distance) / 0.06 + 0.5).clamp(0, 1)


def fit(pixels: Tensor, steps: int) -> Siren:
    """Fit a SIREN to the pixels (784,) of an image."""
    network = Siren()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.9, 0.95))
    decay = steps / 5  # number of steps at the end in which the learning rate decays to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (steps - k) / decay))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(coordinates().T), pixels).backward()
        optimizer.step()
        schedule.step()
    return network


def main(steps: int = 1000) -> float:
    torch.manual_seed(0)
    networks = [fit(draw(strokes), steps) for strokes in DIGITS.values()]

    classifier = INRClassifier.from_checkpoint("mnist-inr")
    with torch.no_grad():
        probabilities = classifier(*stack_networks(networks)).softmax(1)

    for digit, p in zip(DIGITS, probabilities, strict=True):
        print(f"network of a {digit}: classified as {p.argmax()}, probability {p.max():.0%}")
    accuracy = (probabilities.argmax(1) == torch.tensor(list(DIGITS))).float().mean().item()
    print(f"accuracy: {accuracy:.0%}")
    return accuracy


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for networks this small
    main()
