"""Warnings that name the line of the user's own code."""

import sys
import warnings

# Packages that calls come by way of, and whose lines no warning is about.
ON_THE_WAY = ("l2o_graph", "torch", "higher", "jaxtyping", "beartype")


def warn(message: str) -> None:
    """Warn at the line that called this package, be it by way of torch or of ``higher``."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ON_THE_WAY:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
