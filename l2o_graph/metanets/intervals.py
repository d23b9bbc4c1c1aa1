"""Prediction intervals of accuracies, by split conformal prediction.

Intervals come from residuals on networks that a model was not trained on. Residuals are those of
the logit of the accuracy, so that intervals stay within 0 and 1 and are narrow near them.
Checkpoints of one training run are similar, so runs are exchangeable, but networks are not: each
run has the same total weight, and the next run is assumed to be infinitely far off (Lee, Barber
and Willett 2023, "Distribution-free inference with hierarchical data", arXiv 2306.06342). For a
network from a new run of the same kind, the interval then has at least the requested coverage.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from l2o_graph.ranges import Range
from l2o_graph.storage.files import expecting

CLOSEST = 1e-3  # accuracies are clipped at this distance from 0 and 1, where logits are infinite
STEPS = 200  # number of quantiles of residuals that are stored, from 1/200 on
LEVEL = Range(0, 1, above=True, below=True)


class AccuracyPrediction(NamedTuple):
    """Predicted accuracy with an interval: three fractions, from 0 to 1.

    Attributes:
        accuracy: Predicted accuracy.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    accuracy: float
    low: float
    high: float


def residuals_of(
    predicted: Float[Tensor, " I"], accuracy: Float[Tensor, " I"], run: Int64[Tensor, " I"]
) -> dict[str, Any]:
    """Compute the quantiles of residuals for ``interval_around``.

    Args:
        predicted: Accuracies predicted for networks that the model was not trained on.
        accuracy: Their true accuracies.
        run: Index of the training run of each network.

    Returns:
        "runs", the number of runs, and "widths": the quantiles 1/200, 2/200 up to 1 of distances
        of logits, with the same total weight for each run; a JSON object.
    """
    off = (_logit(predicted) - _logit(accuracy)).abs()
    _, which, counts = run.unique(return_inverse=True, return_counts=True)
    order = off.argsort()
    share = (1 / counts.double())[which][order].cumsum(0) / len(counts)
    levels = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    # Tolerance for rounding errors in the cumulative sum.
    index = torch.searchsorted(share, levels - 1e-9).clamp(max=len(off) - 1)
    return {"runs": len(counts), "widths": [round(w, 6) for w in off[order][index].tolist()]}


def interval_around(
    predicted: Float[Tensor, " I"], level: float, residuals: Mapping[str, Any], what: str = "model"
) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
    """Compute the lower and upper ends of prediction intervals.

    Args:
        predicted: Accuracies that the model predicted, from 0 to 1.
        level: Coverage, the fraction of networks of new runs whose accuracy lies inside, in (0, 1).
        residuals: Result of ``residuals_of``; empty for a model without.
        what: Name of the model, for errors.

    Raises:
        ValueError: For a level out of range or too high for the number of runs, and for a model
            without residuals.
    """
    LEVEL.check("interval", level)
    if not residuals:
        raise ValueError(
            f"interval: {what} has no residuals of validation networks, so that no interval can be "
            "computed; a model that is trained again has them"
        )
    with expecting(f"interval: expected of {what} residuals as a number of runs and widths"):
        runs, widths = int(residuals["runs"]), [float(w) for w in residuals["widths"]]
    # The next run, number runs + 1, is assumed to be infinitely far off.
    part = math.ceil(level * (runs + 1) / runs * len(widths) - 1e-9)
    if part > len(widths):
        raise ValueError(
            f"interval: expected at most {runs / (runs + 1):.3f}, the highest level that the "
            f"{runs} validation runs of {what} allow, found {level}"
        )
    middle, width = _logit(predicted), widths[max(part, 1) - 1]
    return (middle - width).sigmoid(), (middle + width).sigmoid()


def covered(
    predicted: Float[Tensor, " I"],
    accuracy: Float[Tensor, " I"],
    level: float,
    residuals: Mapping[str, Any],
) -> float:
    """Compute the fraction of networks whose accuracy lies in the prediction interval."""
    low, high = interval_around(predicted, level, residuals)
    inside = (low <= accuracy) & (accuracy <= high)
    return inside.double().mean().item()


def _logit(share: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
    return share.double().logit(CLOSEST)
