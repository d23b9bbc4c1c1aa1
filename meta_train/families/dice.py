"""Random numbers for all instances of a family, of which a process keeps its own."""

import hashlib
from typing import Any

import torch
from torch import Tensor


def seed_of(*parts: Any) -> int:
    """A seed that differs wherever one of the parts does."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class Dice:
    """What is drawn at random for a family: once for all pairs, or for each pair.

    Numbers are drawn for all pairs and those of other processes thrown away, so that an instance
    is the same whoever holds it: ``mine`` of the ``pairs``. torch's global generator is left alone.
    """

    def __init__(self, seed: int, pairs: int, mine: slice = slice(None)):
        self.seed, self.all_pairs, self.mine = seed, pairs, mine
        self.pairs = len(range(pairs)[mine])
        self._generator = torch.Generator().manual_seed(seed)

    def other(self, *names: Any) -> "Dice":
        """Numbers for another purpose, as a step: the same whatever was drawn here before."""
        return Dice(seed_of(self.seed, *names), self.all_pairs, self.mine)

    def of_all(self, *names: Any) -> "Dice":
        """As :meth:`other`, with the pairs of all processes kept."""
        return Dice(seed_of(self.seed, *names), self.all_pairs)

    # Once for all pairs.

    def integer(self, low: int, high: int) -> int:
        """One of low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def number(self, low: float, high: float) -> float:
        """Uniform."""
        return low + (high - low) * float(torch.rand((), generator=self._generator))

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def chance(self, probability: float) -> bool:
        """True as often as said."""
        return self.number(0.0, 1.0) < probability

    # For each pair: [pairs, *shape].

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(self.all_pairs, *shape, generator=self._generator)[self.mine]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers."""
        drawn = torch.rand(self.all_pairs, *shape, generator=self._generator)[self.mine]
        return low + (high - low) * drawn

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers whose logarithms are uniform."""
        drawn = torch.rand(self.all_pairs, *shape, generator=self._generator)
        # Of all and then taken from: the last bit of a power depends on where in a tensor it is.
        return (low * (high / low) ** drawn)[self.mine]

    def integers(self, below: int, *shape: int) -> Tensor:
        """Integers from 0 on."""
        drawn = torch.randint(below, (self.all_pairs, *shape), generator=self._generator)
        return drawn[self.mine]

    def zipf(self, below: int, *shape: int) -> Tensor:
        """Integers from 0 on, of which number k comes in proportion to 1 / (k + 1)."""
        share = (1 / torch.arange(1, below + 1)).cumsum(0)
        return torch.searchsorted(share / share[-1], self.uniform(*shape)).clamp(max=below - 1)

    def orders(self, count: int) -> Tensor:
        """Permutations of ``count`` things, [pairs, count]."""
        return self.uniform(count).argsort(1)
