"""Sets of CNNs of one or many architectures."""

import math
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int64
from torch import Tensor

from l2o_graph.cnn.architecture import CNNArchitecture


@dataclass(frozen=True, slots=True)
class CNNs:
    """Networks, each with the share of test images that it gets right.

    Attributes:
        architectures: The distinct ones.
        which: Index of each network's architecture.
        values: Parameters of each network, one after another in one row, float32.
        accuracy: On the test images, in [0, 1].
        run: Number of the training run that each network is a checkpoint of.
        step: Training steps done.
    """

    architectures: tuple[CNNArchitecture, ...]
    which: Int64[Tensor, " I"]
    values: tuple[Float[Tensor, " _"], ...]
    accuracy: Float[Tensor, " I"]
    run: Int64[Tensor, " I"]
    step: Int64[Tensor, " I"]

    def __len__(self) -> int:
        return len(self.values)

    def architecture(self, i: int) -> CNNArchitecture:
        """Of network i."""
        return self.architectures[int(self.which[i])]

    def parameters(self, i: int) -> list[Tensor]:
        """Views of network i's parameters, in their shapes."""
        return unflattened(self.values[i], self.architecture(i))


def unflattened(values: Float[Tensor, " _"], architecture: CNNArchitecture) -> list[Tensor]:
    """Views of one row of parameters, in their shapes."""
    shapes = architecture.shapes
    parts = values.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def load_cnns(folder: str | Path, split: str) -> CNNs:
    """Read a split of a zoo: "train", "val" or "test"."""
    raise NotImplementedError
