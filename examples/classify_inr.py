"""Tell which digit a network draws, without drawing it.

    python examples/classify_inr.py

A SIREN of one's own is fitted to each of some digits by an ordinary training loop, and then read by
the packaged classifier, by what it answers at 128 learned points. The digits are drawn with a pen,
so that no dataset is needed.

The classifier knows networks of this layout and formula, however they were fitted.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from l2o_graph import INRClassifier
from l2o_graph.inr import coordinates, stack_networks

# Strokes through points (x, y), from -1 to 1, y downwards.
DIGITS = {
    0: [[(0.4 * math.sin(math.pi * i / 8), 0.6 * math.cos(math.pi * i / 8)) for i in range(17)]],
    1: [[(0.1, -0.65), (-0.1, 0.65)]],
    4: [[(-0.3, -0.55), (-0.35, 0.05), (0.35, 0.05)], [(0.3, -0.55), (0.2, 0.65)]],
    7: [[(-0.4, -0.5), (0.4, -0.5), (-0.05, 0.65)]],
}
PEN = 0.1  # half its width


class Siren(nn.Module):
    """A point -> sin(30 (W x + b)), twice, then a linear layer and 0.5."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 1)
        for layer in (self.first, self.second, self.last):
            bound = (6 / layer.in_features) ** 0.5 / 30
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        """Grey values at points (Q, 2)."""
        hidden = torch.sin(30 * self.first(points))
        return self.last(torch.sin(30 * self.second(hidden))).squeeze(1) + 0.5


def drawn(strokes: list[list[tuple[float, float]]]) -> Tensor:
    """The 784 pixels of strokes with a round pen."""
    points, distance = coordinates().T, torch.full((784,), torch.inf)
    for stroke in map(torch.tensor, strokes):
        for start, end in pairwise(stroke):
            way = end - start
            along = ((points - start) @ way / (way @ way)).clamp(0, 1)[:, None]
            distance = distance.minimum((points - start - along * way).norm(dim=1))
    return ((PEN - distance) / 0.06 + 0.5).clamp(0, 1)


def fitted(pixels: Tensor, steps: int) -> Siren:
    """A network that draws an image."""
    network = Siren()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.9, 0.95))
    falling = steps / 5  # at the end
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (steps - k) / falling))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(coordinates().T), pixels).backward()
        optimizer.step()
        schedule.step()
    return network


def main(steps: int = 1000) -> float:
    torch.manual_seed(0)
    networks = [fitted(drawn(strokes), steps) for strokes in DIGITS.values()]

    classifier = INRClassifier.from_checkpoint("mnist-inr")
    with torch.no_grad():
        shares = classifier(*stack_networks(networks)).softmax(1)

    for digit, share in zip(DIGITS, shares, strict=True):
        print(f"a network that draws {digit}: read as {share.argmax()}, {share.max():.0%} sure")
    accuracy = (shares.argmax(1) == torch.tensor(list(DIGITS))).float().mean().item()
    print(f"right: {accuracy:.0%}")
    return accuracy


if __name__ == "__main__":
    torch.set_num_threads(1)  # with networks this small, threads wait for each other
    main()
