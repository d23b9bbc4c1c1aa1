"""Unrolled training runs, and their meta-gradients.

The paper's meta-gradient evaluates each update separately. The exact one is second-order
back-propagation through time: every step depends on the rule through all steps before it, by
weights, gradients and momenta. Its memory grows with the number of steps, because each step keeps
the graphs of the network, of its gradient and of the rule.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from l2o_graph.paper.rule import UpdateRule
from l2o_graph.paper.step import State, update
from meta_train.tasks import Problem


def loss_and_gradients(
    problem: Problem, parameters: Sequence[Tensor], batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss on a batch, detached, and its gradients."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    loss = problem.loss(leaves, batch)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def greedy(rule: UpdateRule, problem: Problem, steps: int) -> list[float]:
    """Train a problem, and evaluate each update on its own batch.

    Adds sum_t d CE(theta_t + update_t; B_t) / d rule to the gradients of the rule. Gradients and
    features are treated as constants, so memory does not grow with the number of steps. Returns the
    loss after each step, on its own batch.
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
    """Train a problem; return the loss before each step, and the parameters at the end."""
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


def unrolled(
    rule: UpdateRule,
    problem: Problem,
    parameters: Sequence[Tensor],
    state: Sequence[State],
    steps: int,
) -> list[Tensor]:
    """Train a network from parameters that require gradients, and keep the whole graph.

    Returns the loss before each step and the one after the last, each on a new batch. They are
    differentiable in the rule's weights and in the initial parameters.
    """
    parameters, state = list(parameters), list(state)
    losses = []
    for t in range(steps):
        losses.append(problem.loss(parameters, problem.batch(t)))
        gradients = torch.autograd.grad(losses[-1], parameters, create_graph=True)
        deltas, state = update(rule, problem.spec, parameters, gradients, state, through_time=True)
        parameters = [p + d for p, d in zip(parameters, deltas, strict=True)]
    losses.append(problem.loss(parameters, problem.batch(steps)))
    return losses


def through_time(rule: UpdateRule, problem: Problem, steps: int) -> list[float]:
    """Train a problem, and compute the exact meta-gradient of its losses.

    Adds d mean_t CE(theta_t; B_t) / d rule to the gradients of the rule, with t over the ``steps``
    updated states of the network. Returns the loss after each step, on a new batch.
    """
    start = [p.detach().clone().requires_grad_() for p in problem.module.parameters()]
    losses = unrolled(rule, problem, start, [State.fresh(p) for p in start], steps)
    made = torch.stack(losses[1:])  # the first does not depend on the rule
    made.mean().backward(inputs=list(rule.parameters()))
    return made.tolist()
