"""Training runs through the pure update, and the paper's meta-gradient of what they did."""

from collections.abc import Sequence

import torch
from torch import Tensor

from l2o_graph.paper.rule import UpdateRule
from l2o_graph.paper.step import State, update
from meta_train.tasks import Problem


def loss_and_gradients(
    problem: Problem, parameters: Sequence[Tensor], batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Loss on a batch, detached, and its gradients."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    loss = problem.loss(leaves, batch)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def greedy(rule: UpdateRule, problem: Problem, steps: int) -> list[float]:
    """Train a problem from its start, and judge each update on the very batch it came from.

    Adds sum_t d CE(theta_t + update_t; B_t) / d rule to the gradients of the rule. Gradients and
    features count as constants, so memory does not grow with the number of steps.

    Returns:
        The loss after each step, on its own batch.
    """
    parameters = [p.detach() for p in problem.module.parameters()]
    state = [State.fresh(p) for p in parameters]
    losses = []
    for t in range(steps):
        batch = problem.batch(t)
        _, gradients = loss_and_gradients(problem, parameters, batch)
        deltas, state = update(rule, problem.spec, parameters, gradients, state)
        moved = [p + d for p, d in zip(parameters, deltas, strict=True)]
        loss = problem.loss(moved, batch)
        loss.backward()
        parameters = [p.detach() for p in moved]
        losses.append(loss.item())
    return losses


@torch.no_grad()
def roll_out(rule: UpdateRule, problem: Problem, steps: int) -> tuple[list[float], list[Tensor]]:
    """Train a problem from its start.

    Returns:
        The loss before each step, and the parameters at the end.
    """
    parameters = [p.detach() for p in problem.module.parameters()]
    state = [State.fresh(p) for p in parameters]
    losses = []
    for t in range(steps):
        with torch.enable_grad():
            loss, gradients = loss_and_gradients(problem, parameters, problem.batch(t))
        losses.append(loss.item())
        deltas, state = update(rule, problem.spec, parameters, gradients, state)
        parameters = [p + d for p, d in zip(parameters, deltas, strict=True)]
    return losses, parameters
