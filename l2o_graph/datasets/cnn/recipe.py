"""Training recipes of CNN zoos, and random draws of hyperparameters."""

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

TEST_BATCH = 500  # number of images; activations of a convolution then fit in the cache

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Training recipe of all networks of a zoo.

    Attributes:
        steps: Number of training steps.
        batch: Number of images in a batch, drawn with replacement.
        checkpoints: Number of checkpoints of each network; the last is at the end.
        longest: Number of steps of the longest run. Numbers of steps are drawn log-uniformly from
            ``steps`` to this; 0 for ``steps`` in all runs.
        channels: Numbers of channels to draw from; () for the defaults of the kind of zoo.
        strides: Strides to draw from; () likewise.
        cost: Largest number of multiplications, in millions, of a network's convolutions for one
            image. Architectures with more are drawn again; 0 for no limit.
    """

    steps: int
    batch: int
    checkpoints: int
    longest: int = 0
    channels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
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
        """Number of steps at each checkpoint; denser early in training, when more changes."""
        n = self.checkpoints
        return tuple(max(k, round(self.steps * (k / n) ** 2)) for k in range(1, n + 1))

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object; without optional fields that have their default."""
        content = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        required = ("steps", "batch", "checkpoints")  # headers of older zoos have only these
        return {k: v for k, v in content.items() if v or k in required}

    def drawn(self, generator: torch.Generator) -> "Recipe":
        """Draw the number of steps of one run; nothing is drawn if all runs have the same."""
        if not self.longest:
            return self
        steps = round(log_uniform(float(self.steps), float(self.longest), generator))
        return replace(self, steps=steps, longest=0)


# Function that trains runs of these numbers, with a generator each, and evaluates their checkpoints
# on the test images; checkpoints with non-finite weights are left out.
Train = Callable[[Sequence[int], Sequence[torch.Generator], Images, Recipe], list[Run]]


@torch.no_grad()
def accuracies_of(
    logits: Callable[[Float[Tensor, "B C height width"]], Float[Tensor, "B I classes"]],
    images: Images,
) -> Float[Tensor, " I"]:
    """Compute the test accuracy of each network, given a function from images to logits."""
    right = []
    for x, y in zip(images.test_x.split(TEST_BATCH), images.test_y.split(TEST_BATCH), strict=True):
        right.append((logits(images.normalise(x)).argmax(2) == y[:, None]).sum(0))
    return torch.stack(right).sum(0) / len(images.test_x)


def one_of(choices: Sequence[T], generator: torch.Generator) -> T:
    """Draw one of the choices uniformly."""
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw a number uniformly."""
    return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=generator))


def log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw a number whose logarithm is uniform."""
    return math.exp(uniform(math.log(low), math.log(high), generator))
