"""How networks of a zoo are trained, and how what differs between them is drawn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph.datasets.cnn.files import Run
from l2o_graph.datasets.images import Images
from l2o_graph.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, check_ranges

TESTED = 500  # images at once: what a convolution holds of them stays in the cache

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all networks of a zoo share."""

    steps: int  # of training
    batch: int  # images of a step, drawn with replacement
    checkpoints: int  # to keep of each network, the last at the end
    # Steps of the longest run, where lengths differ: their logarithm is drawn evenly from that of
    # ``steps`` on; 0 where all runs have ``steps``.
    longest: int = 0
    channels: tuple[int, ...] = ()  # widths to draw from; () for the kind's own
    strides: tuple[int, ...] = ()  # likewise
    # Million multiplications that the convolutions of a network may take for an image; costlier
    # ones are drawn again. 0 for any.
    cost: float = 0.0

    def __post_init__(self):
        check_ranges(self, steps=COUNT, batch=COUNT, checkpoints=COUNT, longest=COUNT_OR_NONE,
            cost=NOT_NEGATIVE)  # fmt: skip
        for name in ("channels", "strides"):
            for number in getattr(self, name):
                COUNT.check(name, number)
        if 0 < self.longest < self.steps:
            raise ValueError(
                f"longest: expected at least the {self.steps} steps of the shortest run, found "
                f"{self.longest}"
            )
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

    def to_json(self) -> dict[str, Any]:
        """Convert to what JSON holds; fields after the third only where they say something."""
        content = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        usual = ("steps", "batch", "checkpoints")  # all that a header of an older zoo has
        return {k: v for k, v in content.items() if v or k in usual}

    def drawn(self, generator: torch.Generator) -> "Recipe":
        """Draw the length of one run; the recipe itself, and no draw, where all are as long."""
        if not self.longest:
            return self
        steps = round(log_uniform(float(self.steps), float(self.longest), generator))
        return replace(self, steps=steps, longest=0)


# Trains runs of these numbers, by the random numbers of a generator each, and tests checkpoints on
# the same dataset; those that are not finite are left out.
Train = Callable[[Sequence[int], Sequence[torch.Generator], Images, Recipe], list[Run]]


@torch.no_grad()
def shares_right(
    logits: Callable[[Float[Tensor, "B C height width"]], Float[Tensor, "B I classes"]],
    images: Images,
) -> Float[Tensor, " I"]:
    """Share of the test images that each network gets right, by its logits for images."""
    right = []
    for x, y in zip(images.test_x.split(TESTED), images.test_y.split(TESTED), strict=True):
        right.append((logits(images.normalise(x)).argmax(2) == y[:, None]).sum(0))
    return torch.stack(right).sum(0) / len(images.test_x)


def one_of(choices: Sequence[T], generator: torch.Generator) -> T:
    """Draw one of some choices, evenly."""
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw a number evenly."""
    return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=generator))


def log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw a number whose logarithm is uniform."""
    return math.exp(uniform(math.log(low), math.log(high), generator))
