"""How far predictions of accuracy were off, and so how far the next one may be.

Conformal prediction: residuals of networks that a model was not trained on, here of the logit of
the accuracy, so that an interval stays within 0 and 1 and is narrow near them. Checkpoints of one
training run resemble each other, so that it is runs that are exchangeable, not networks: each run
weighs as much as any other, whatever the number of its checkpoints, and one more, the next,
is taken to be infinitely far off (Lee, Barber and Willett 2023, "Distribution-free inference with
hierarchical data", arXiv 2306.06342). For a network drawn from a new run of the same kind the
interval then holds in at least the share of cases that is asked for.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from l2o_graph.ranges import Range
from l2o_graph.storage.files import expecting

CLOSEST = 1e-3  # to 0 and to 1 that an accuracy is taken to be: of either the logit is infinite
STEPS = 200  # quantiles of residuals that are kept, from 1/200 on
LEVEL = Range(0, 1, above=True, below=True)


class AccuracyPrediction(NamedTuple):
    """What a predictor says of a network: three fractions, from 0 to 1.

    Attributes:
        accuracy: Prediction itself.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    accuracy: float
    low: float
    high: float


def residuals_of(
    predicted: Float[Tensor, " I"], accuracy: Float[Tensor, " I"], run: Int64[Tensor, " I"]
) -> dict[str, Any]:
    """Sum up how far predictions were off, for ``interval_around``.

    Args:
        predicted: Accuracies that a model predicted, of networks that it was not trained on.
        accuracy: Accuracies that these have.
        run: Numbers of the training runs that they are checkpoints of.

    Returns:
        "runs", how many these are, and "widths": distances of logits, those below which lie 1, 2
        up to 200 of 200 parts of all networks, each run counted as much as any other; as JSON can
        hold them.
    """
    off = (_logit(predicted) - _logit(accuracy)).abs()
    _, which, counts = run.unique(return_inverse=True, return_counts=True)
    order = off.argsort()
    share = (1 / counts.double())[which][order].cumsum(0) / len(counts)
    levels = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    # A sum of many shares may miss by a rounding what it should be.
    index = torch.searchsorted(share, levels - 1e-9).clamp(max=len(off) - 1)
    return {"runs": len(counts), "widths": [round(w, 6) for w in off[order][index].tolist()]}


def interval_around(
    predicted: Float[Tensor, " I"], level: float, residuals: Mapping[str, Any], what: str = "model"
) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
    """Give the lower and upper ends of the intervals that accuracies of networks lie in.

    Args:
        predicted: Accuracies that the model predicted, from 0 to 1.
        level: Share of networks of new runs whose accuracy is to lie inside, in (0, 1).
        residuals: What ``residuals_of`` gave; empty for a model without.
        what: Name of the model, for errors.

    Raises:
        ValueError: For a level out of range, for one that so few runs cannot speak for, and for a
            model without residuals.
    """
    LEVEL.check("interval", level)
    if not residuals:
        raise ValueError(
            f"interval: {what} does not say how far its predictions were off, so that no interval "
            "can be given; one that is trained anew says it"
        )
    with expecting(f"interval: expected of {what} residuals as a number of runs and widths"):
        runs, widths = int(residuals["runs"]), [float(w) for w in residuals["widths"]]
    # Of runs + 1 the last is infinitely far off.
    part = math.ceil(level * (runs + 1) / runs * len(widths) - 1e-9)
    if part > len(widths):
        raise ValueError(
            f"interval: expected at most {runs / (runs + 1):.3f}, as far as the {runs} runs reach "
            f"that {what} was judged by, found {level}"
        )
    middle, width = _logit(predicted), widths[max(part, 1) - 1]
    return (middle - width).sigmoid(), (middle + width).sigmoid()


def covered(
    predicted: Float[Tensor, " I"],
    accuracy: Float[Tensor, " I"],
    level: float,
    residuals: Mapping[str, Any],
) -> float:
    """Share of networks whose accuracy lies in the interval around what was predicted of it."""
    low, high = interval_around(predicted, level, residuals)
    inside = (low <= accuracy) & (accuracy <= high)
    return inside.double().mean().item()


def _logit(share: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
    return share.double().logit(CLOSEST)
