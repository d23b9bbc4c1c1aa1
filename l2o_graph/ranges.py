"""Which numbers an option may be: one check, in one wording, for all configurations."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers from a least to a greatest one.

    Attributes:
        least: The least, itself allowed.
        most: The greatest, itself allowed.
        above: Whether the least itself is not allowed.
        below: Whether the greatest itself is not allowed.
        whole: Whether only integers are.
    """

    least: int | float
    most: int | float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False

    def __str__(self) -> str:
        if self.above or self.below:
            low = f"more than {self.least}" if self.above else f"at least {self.least}"
            high = f"less than {self.most}" if self.below else f"at most {self.most}"
            return low if self.most == math.inf else f"{low}, {high}"
        if self.most == math.inf:
            return f"at least {self.least}"
        return f"from {self.least} to {self.most}"

    def check(self, name: str, value: Any) -> None:
        """Refuse what is not in it.

        Args:
            name: Name of the option, for the error.
            value: Value that was given.

        Raises:
            ValueError: For any other number, and for what is none.
        """
        right = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        if not right or not _is_finite(value):
            kind = "an integer" if self.whole else "a finite number"
            raise ValueError(f"{name}: expected {kind}, {self}, found {value!r}")
        number: Any = value  # checkers know of no order of Real
        low = number > self.least if self.above else number >= self.least
        high = number < self.most if self.below else number <= self.most
        if not (low and high):
            raise ValueError(f"{name}: expected {self}, found {value!r}")


def _is_finite(number: Any) -> bool:
    """Whether a number is; an integer is, however long."""
    return isinstance(number, Integral) or math.isfinite(number)


COUNT, COUNT_OR_NONE = Range(1, whole=True), Range(0, whole=True)
POSITIVE, NOT_NEGATIVE = Range(0, above=True), Range(0)
SHARE, SHARE_BELOW_ONE = Range(0, 1), Range(0, 1, below=True)
# Trainers multiply a seed by millions, or by 8 purposes and 2^32 numbers, and 2^64 is all that a
# generator takes.
SEED = Range(0, (1 << 28) - 1, whole=True)
THREADS = Range(1, 4096, whole=True)  # torch cannot be told more than fit into 32 bits


def check_ranges(options: object, **ranges: Range) -> None:
    """Refuse options that are out of their range.

    Args:
        options: Object that has them as attributes.
        ranges: Range of each option by name.

    Raises:
        ValueError: Naming the first that is.
    """
    for name, allowed in ranges.items():
        allowed.check(name, getattr(options, name))


def check_choices(options: object, **kinds: Any) -> None:
    """Refuse options that are none of some words.

    Args:
        options: Object that has them as attributes.
        kinds: Literal type of each option, or a tuple of its words, by name.

    Raises:
        ValueError: For the first that is another word, naming it.
    """
    for name, kind in kinds.items():
        words = kind if isinstance(kind, tuple) else get_args(kind)
        if getattr(options, name) not in words:
            expected = " or ".join(map(repr, words))
            raise ValueError(f"{name}: expected {expected}, found {getattr(options, name)!r}")
