"""The families by name, and the draw of one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from l2o_graph.registry import registering
from meta_train.families.base import Plan, Problems
from meta_train.families.dice import Dice, seed_of
from meta_train.families.images import Pictures

Build = Callable[[Dice, Pictures], Plan]

# Share of the instances of networks that are far from done after a thousand steps: wider, on larger
# images and batches. Small networks on small batches are soon as good as they get, and ask for
# short steps early; these ask for the opposite. They cost as much as the others do with all.
LARGE = 0.125


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of problem: see ``register_family``."""

    build: Build
    held_out: bool = False
    share: float = 1.0

    def pairs(self, usual: int) -> int:
        """Number of instances in place of the usual number."""
        return max(round(self.share * usual), 1)


FAMILIES: dict[str, Family] = {}
"""All families by name; ``register_family`` adds to them."""


def register_family(
    name: str, held_out: bool = False, share: float = 1.0
) -> Callable[[Build], Build]:
    """Add a family: decorates a function ``build(dice, pictures) -> Plan``.

    Args:
        name: Name to draw it by.
        held_out: Whether it is never trained on, and designs are compared on it.
        share: Fraction of the usual number of instances that it is worked on with, being larger.

    Raises:
        ValueError: For a name that another family has.
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
    """Draw instances of a family; all of it is determined by the arguments.

    Args:
        family: A name of ``FAMILIES``.
        seed: Seed of everything that is random.
        pairs: Number of instances P in all processes together.
        mine: Those of them that this process has; they are the same as if it had all.
        validation: Whether to show images that training does not.
        data_root: Folder where FashionMNIST lies; without it the sample in the package is shown.
        augment: Whether some instances are stored in other units.

    Returns:
        The instances, with their start, their batches and their loss.

    Raises:
        ValueError: For a family that is not known, and where no pair is left.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family '{family}', expected one of {sorted(FAMILIES)}")
    dice = Dice(seed_of(family, seed), pairs, mine)
    if not dice.pairs:
        raise ValueError(f"no pair is left of {pairs} by {mine}")
    pictures = Pictures.load(data_root, validation)
    # Modules draw a start of their own from the global generator, which nobody looks at.
    with torch.random.fork_rng(devices=[]):
        plan = FAMILIES[family].build(dice.other("plan"), pictures)
    return Problems(plan, dice, augment)
