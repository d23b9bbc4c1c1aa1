"""Families of small training problems, for meta-training and for comparing designs."""

from meta_train.families import (  # noqa: F401  families are registered on import
    attention,
    cnn,
    embedding,
    fine_tune,
    held_out,
    ill_posed,
    mlps,
    recurrence,
)
from meta_train.families.base import Problems
from meta_train.families.registry import FAMILIES, draw, register_family

TRAINING = tuple(name for name, family in FAMILIES.items() if not family.held_out)
"""Names of the packaged families for meta-training."""

HELD_OUT = tuple(name for name, family in FAMILIES.items() if family.held_out)
"""Names of the packaged families that are never used in meta-training."""

__all__ = ["FAMILIES", "HELD_OUT", "TRAINING", "Problems", "draw", "register_family"]
