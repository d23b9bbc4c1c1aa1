"""Ranges of options, and their checks with uniform messages."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args


@dataclass(frozen=True, slots=True)
class Range:
    """Range of finite numbers.

    Attributes:
        least: Lower bound, inclusive by default.
        most: Upper bound, inclusive by default.
        above: Whether the lower bound is exclusive.
        below: Whether the upper bound is exclusive.
        whole: Whether only integers are allowed.
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
        """Raise for a value outside the range.

        Args:
            name: Name of the option, for the error.
            value: Value of the option.

        Raises:
            ValueError: For a number outside the range, and for anything but a number.
        """
        right = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        if not right or not _is_finite(value):
            kind = "an integer" if self.whole else "a finite number"
            raise ValueError(f"{name}: expected {kind}, {self}, found {value!r}")
        number: Any = value  # type checkers do not know that Real is ordered
        low = number > self.least if self.above else number >= self.least
        high = number < self.most if self.below else number <= self.most
        if not (low and high):
            raise ValueError(f"{name}: expected {self}, found {value!r}")


def _is_finite(number: Any) -> bool:
    """Return whether a number is finite; integers of any size are."""
    return isinstance(number, Integral) or math.isfinite(number)


COUNT, COUNT_OR_NONE = Range(1, whole=True), Range(0, whole=True)
POSITIVE, NOT_NEGATIVE = Range(0, above=True), Range(0)
SHARE, SHARE_BELOW_ONE = Range(0, 1), Range(0, 1, below=True)
# Trainers multiply a seed by millions, or by 8 purposes times 2^32 numbers, and a generator takes
# seeds below 2^64.
SEED = Range(0, (1 << 28) - 1, whole=True)
THREADS = Range(1, 4096, whole=True)  # torch fails for numbers beyond 32 bits


def check_ranges(options: object, **ranges: Range) -> None:
    """Raise for options that are out of their range.

    Args:
        options: Object with the options as attributes.
        ranges: Range of each option by name.

    Raises:
        ValueError: For the first option out of range, naming it.
    """
    for name, allowed in ranges.items():
        allowed.check(name, getattr(options, name))


def check_choices(options: object, **kinds: Any) -> None:
    """Raise for options that are not among their allowed words.

    Args:
        options: Object with the options as attributes.
        kinds: Literal type of each option, or a tuple of its words, by name.

    Raises:
        ValueError: For the first option with another word, naming it.
    """
    for name, kind in kinds.items():
        words = kind if isinstance(kind, tuple) else get_args(kind)
        if getattr(options, name) not in words:
            expected = " or ".join(map(repr, words))
            raise ValueError(f"{name}: expected {expected}, found {getattr(options, name)!r}")
