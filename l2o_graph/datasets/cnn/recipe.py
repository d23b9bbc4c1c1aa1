"""How networks of a zoo are trained, and how what differs between them is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from l2o_graph.ranges import COUNT, check_ranges

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all networks of a zoo share.

    Attributes:
        steps: Of training.
        batch: Images of a step, drawn with replacement.
        checkpoints: To keep of each network, the last at the end.
    """

    steps: int
    batch: int
    checkpoints: int

    def __post_init__(self):
        check_ranges(self, steps=COUNT, batch=COUNT, checkpoints=COUNT)
        if self.steps < self.checkpoints:
            raise ValueError(
                f"steps: expected at least one for each of {self.checkpoints} checkpoints, found "
                f"{self.steps}"
            )

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Steps done at each checkpoint: they lie closer at first, where more changes."""
        n = self.checkpoints
        return tuple(max(k, round(self.steps * (k / n) ** 2)) for k in range(1, n + 1))


def one_of(choices: Sequence[T], generator: torch.Generator) -> T:
    """Draw one of some choices, evenly."""
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw a number evenly."""
    return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=generator))


def log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw a number whose logarithm is uniform."""
    return math.exp(uniform(math.log(low), math.log(high), generator))
