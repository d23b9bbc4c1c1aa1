"""Kinds of problems that are never trained on, and on which designs are compared."""

from meta_train.families.held_out import (  # noqa: F401  families are registered on import
    contrastive,
    dense_links,
    gated,
    imbalance,
    mixer,
    pinn,
    unet,
    variational,
)
