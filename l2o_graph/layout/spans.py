"""Runs of scalars of parameters, and their features."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """A run of scalars of one parameter, a grid of cells with K positions each.

    A cell of a kernel is an edge; of a bias or a loose parameter it is a single scalar.

    Attributes:
        parameter: Index of the parameter.
        start: First scalar of the run within the flattened parameter.
        stop: End of the run.
        positions: Spatial shape of a cell; () for a single scalar.
        read_only: Whether these scalars are updated elsewhere, or never.
    """

    parameter: int
    start: int
    stop: int
    positions: tuple[int, ...]
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Scalars:
    """Features of the scalars of several parts, one part after the other.

    Attributes:
        parts: The parts.
        x: (F, n) features.
    """

    parts: tuple[Span, ...]
    x: Float[Tensor, "F n"]
