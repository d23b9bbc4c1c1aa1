"""Antithetic evolution strategies: the meta-gradient of a whole training run, without a graph.

What an update is worth shows only much later, and a first-order gradient cannot tell: it takes
noise for harm that lasts, and does not know the curvature that makes one direction worth more
than another. Training the same network twice, with the rule moved a little one way and the same
little the other way, can (Salimans et al. 2017; Metz et al. 2019 for learned optimizers). It says
one number a pair, so it only moves the last layer of the head: what its hidden units, which see
features and graph, mean for direction and magnitude.
"""

import copy
import math

import torch
from torch import Tensor, nn

from l2o_graph.rule import UpdateRule
from meta_train.tasks import Problem
from meta_train.unroll import roll_out

# Standard deviation of the perturbation, in the units of the last layer's weights.
SIGMA = 0.2

# A run is judged by the last fifth of its losses, capped at half as much again as guessing's.
JUDGED = 0.2
WORST_LOSS = 1.5 * math.log(10)


def evolve(
    rule: UpdateRule, problem: Problem, steps: int, generator: torch.Generator
) -> list[float]:
    """Estimate the gradient of a run's final log loss from one antithetic pair of runs.

    Adds (f(phi + sigma e) - f(phi - sigma e)) / (2 sigma) e to the gradients of the head's last
    layer phi, with e standard normal and f the mean of the log loss at the end of a run.

    Args:
        rule: The rule.
        problem: What both runs train, from its start.
        steps: Of a run.
        generator: Of e.

    Returns:
        The losses of the two runs, one after the other.
    """
    weights = last_layer(rule)
    noise = [torch.randn(p.shape, generator=generator).to(p) for p in weights]
    outcomes, losses = [], []
    for sign in (1, -1):
        run, _ = roll_out(moved(rule, noise, sign * SIGMA), problem, steps)
        outcomes.append(final_log_loss(run))
        losses += run
    slope = (outcomes[0] - outcomes[1]) / (2 * SIGMA)
    for p, e in zip(weights, noise, strict=True):
        p.grad = slope * e if p.grad is None else p.grad + slope * e
    return losses


def final_log_loss(losses: list[float]) -> float:
    """Mean log loss over the last fifth of a run; a loss that is not finite counts as the worst."""
    last = losses[-max(round(JUDGED * len(losses)), 1) :]
    capped = [min(loss, WORST_LOSS) if math.isfinite(loss) else WORST_LOSS for loss in last]
    return math.log(sum(capped) / len(capped))


@torch.no_grad()
def moved(rule: UpdateRule, noise: list[Tensor], by: float) -> UpdateRule:
    """A copy of the rule, its head's last layer moved along the noise."""
    other = copy.deepcopy(rule)
    for p, e in zip(last_layer(other), noise, strict=True):
        p.add_(e, alpha=by)
    return other


def last_layer(rule: UpdateRule) -> list[nn.Parameter]:
    """Weights and biases of the last layer of the head."""
    layers = [m for m in rule.head.modules() if isinstance(m, nn.Linear)]
    return list(layers[-1].parameters())
