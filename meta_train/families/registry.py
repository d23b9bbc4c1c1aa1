"""Registry of families, and drawing problems from them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from l2o_graph.registry import registering
from meta_train.families.base import Plan, Problems
from meta_train.families.dice import Dice, seed_of
from meta_train.families.images import Pictures

Build = Callable[[Dice, Pictures], Plan]

# Fraction of the usual number of instances for larger families: wider networks on larger images and
# batches, which are far from converged after a thousand steps. Small networks on small batches
# converge soon and favour short steps early; these favour the opposite. With this fraction they
# cost as much as the others.
LARGE = 0.125


@dataclass(frozen=True, slots=True)
class Family:
    """A distribution of problems: see ``register_family``."""

    build: Build
    held_out: bool = False
    share: float = 1.0

    def pairs(self, usual: int) -> int:
        """Return the number of instances, given the usual number."""
        return max(round(self.share * usual), 1)


FAMILIES: dict[str, Family] = {}
"""All families by name; ``register_family`` adds to them."""


def register_family(
    name: str, held_out: bool = False, share: float = 1.0
) -> Callable[[Build], Build]:
    """Register a family: a decorator of a function ``build(dice, pictures) -> Plan``.

    Args:
        name: Name of the family.
        held_out: Whether it is not used in meta-training, only to compare designs.
        share: Fraction of the usual number of instances, below 1 for larger problems.

    Raises:
        ValueError: For a name that is taken.
    """
    return registering(FAMILIES, name, "family", lambda build: Family(build, held_out, share))


def draw(
    family: str,
    seed: int,
    pairs: int,
    mine: slice = slice(None),
    validation: bool = False,
    data_root: str | Path | None = None,
    augment: bool = True,
) -> Problems:
    """Draw instances of a family, determined by the arguments.

    Args:
        family: Name in ``FAMILIES``.
        seed: Seed of everything that is random.
        pairs: Number of instances P over all processes.
        mine: Range of this process's instances, which do not depend on it.
        validation: Whether to use validation images instead of training images.
        data_root: Folder of FashionMNIST; without it, the sample in the package is used.
        augment: Whether some instances have other units.

    Returns:
        Instances, with their initial parameters, batches and losses.

    Raises:
        ValueError: For an unknown family, and if ``mine`` is empty.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family '{family}', expected one of {sorted(FAMILIES)}")
    dice = Dice(seed_of(family, seed), pairs, mine)
    if not dice.pairs:
        raise ValueError(f"mine: expected at least one of {pairs} pairs, found none in {mine}")
    pictures = Pictures.load(data_root, validation)
    # Modules initialise themselves with the global generator; these weights are not used.
    with torch.random.fork_rng(devices=[]):
        plan = FAMILIES[family].build(dice.other("plan"), pictures)
    return Problems(plan, dice, augment)
