"""Antithetic evolution strategies: how long steps should be, learned from whole training runs.

What a long step costs and what it brings show only much later, and a first-order gradient cannot
tell: it takes noise for harm that lasts, and judges a step by a segment that ends too soon.
Training the same network twice to its end, with the lengths moved a little one way and as much
the other way, can (Salimans et al. 2017; Metz et al. 2019 for learned optimizers). It says one
number a pair, so it moves the few weights of the per-tensor head alone.
"""

import copy
import math

import torch
from torch import Tensor

from l2o_graph.rule import UpdateRule
from meta_train.tasks import Problem
from meta_train.unroll import roll_out

# Standard deviation of the perturbation; features are about 1, so lengths move by some 40 %.
SIGMA = 0.3

# A run is judged by the last fifth of its losses, capped at half as much again as guessing's.
JUDGED = 0.2
WORST_LOSS = 1.5 * math.log(10)


def evolve(
    rule: UpdateRule, problem: Problem, steps: int, generator: torch.Generator
) -> tuple[float, float]:
    """Estimate the gradient of a run's final log loss from one antithetic pair of runs.

    Adds (f(phi + sigma e) - f(phi - sigma e)) / (2 sigma) e to the gradients of the per-tensor
    head phi, with e standard normal and f the mean of the log loss at the end of a run.

    Args:
        rule: The rule.
        problem: What both runs train, from its start.
        steps: Of a run.
        generator: Of e.

    Returns:
        The final log losses of the two runs.
    """
    noise = [torch.randn(p.shape, generator=generator).to(p) for p in rule.of_length()]
    one, other = (
        final_log_loss(roll_out(moved(rule, noise, by), problem, steps)[0])
        for by in (SIGMA, -SIGMA)
    )
    slope = (one - other) / (2 * SIGMA)
    for p, e in zip(rule.of_length(), noise, strict=True):
        p.grad = slope * e if p.grad is None else p.grad + slope * e
    return one, other


def final_log_loss(losses: list[float]) -> float:
    """Mean log loss over the last fifth of a run; a loss that is not finite counts as the worst."""
    last = losses[-max(round(JUDGED * len(losses)), 1) :]
    capped = [min(loss, WORST_LOSS) if math.isfinite(loss) else WORST_LOSS for loss in last]
    return math.log(sum(capped) / len(capped))


@torch.no_grad()
def moved(rule: UpdateRule, noise: list[Tensor], by: float) -> UpdateRule:
    """A copy of the rule, its per-tensor head moved along the noise."""
    other = copy.deepcopy(rule)
    for p, e in zip(other.of_length(), noise, strict=True):
        p.add_(e, alpha=by)
    return other
