"""Random numbers for the instances of a family, independent of the number of processes."""

import hashlib
from typing import Any

import torch
from torch import Tensor


def seed_of(*parts: Any) -> int:
    """Hash the parts to a seed."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class Dice:
    """Random number generator of a family: numbers for all pairs in common, or for each pair.

    Numbers are drawn for all pairs, and those of other processes discarded, so an instance does
    not depend on the process that has it: ``mine`` of the ``pairs``. torch's global generator is
    not used.
    """

    def __init__(self, seed: int, pairs: int, mine: slice = slice(None)):
        self.seed, self.all_pairs, self.mine = seed, pairs, mine
        self.pairs = len(range(pairs)[mine])
        self._generator = torch.Generator().manual_seed(seed)

    def other(self, *names: Any) -> "Dice":
        """Create an independent generator for another purpose, for example a step."""
        return Dice(seed_of(self.seed, *names), self.all_pairs, self.mine)

    def of_all(self, *names: Any) -> "Dice":
        """Create one as :meth:`other` does, for the pairs of all processes."""
        return Dice(seed_of(self.seed, *names), self.all_pairs)

    # In common for all pairs.

    def integer(self, low: int, high: int) -> int:
        """Draw an integer from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def number(self, low: float, high: float) -> float:
        """Draw a uniform number."""
        return low + (high - low) * float(torch.rand((), generator=self._generator))

    def pick(self, *options: Any) -> Any:
        """Draw one of the options."""
        return options[self.integer(0, len(options) - 1)]

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.number(0.0, 1.0) < probability

    # For each pair: [pairs, *shape].

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(self.all_pairs, *shape, generator=self._generator)[self.mine]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw uniform numbers."""
        drawn = torch.rand(self.all_pairs, *shape, generator=self._generator)[self.mine]
        return low + (high - low) * drawn

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw log-uniform numbers."""
        drawn = torch.rand(self.all_pairs, *shape, generator=self._generator)
        # Powers before slicing: the last bit of a power depends on its place in a tensor.
        return (low * (high / low) ** drawn)[self.mine]

    def integers(self, below: int, *shape: int) -> Tensor:
        """Draw integers from 0 to ``below`` - 1."""
        drawn = torch.randint(below, (self.all_pairs, *shape), generator=self._generator)
        return drawn[self.mine]

    def zipf(self, below: int, *shape: int) -> Tensor:
        """Draw integers k below ``below`` with probabilities proportional to 1 / (k + 1)."""
        share = (1 / torch.arange(1, below + 1)).cumsum(0)
        return torch.searchsorted(share / share[-1], self.uniform(*shape)).clamp(max=below - 1)

    def orders(self, count: int) -> Tensor:
        """Draw permutations of ``count`` items, [pairs, count]."""
        return self.uniform(count).argsort(1)
