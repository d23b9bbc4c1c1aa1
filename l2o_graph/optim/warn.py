"""Warnings that point to the user's own code."""

import sys
import warnings

# Packages between the user's code and a warning, which are skipped.
ON_THE_WAY = ("l2o_graph", "torch", "higher", "jaxtyping", "beartype")


def warn(message: str) -> None:
    """Warn at the line that called this package, directly or through torch or ``higher``."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ON_THE_WAY:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
