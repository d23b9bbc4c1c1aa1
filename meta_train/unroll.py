"""Training runs through the pure update, and meta-gradients of what they did.

The paper's judges each update by itself. The exact one is back-propagation through time, second
order: every step depends on the rule through all steps before it, by the weights it finds, by their
gradients and by the momenta. Its memory grows with the run, since each step keeps the graphs of the
network, of its gradient and of the rule.
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
    """Loss on a batch, detached, and its gradients."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    loss = problem.loss(leaves, batch)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def greedy(rule: UpdateRule, problem: Problem, steps: int) -> list[float]:
    """Train a problem, and judge each update on the very batch it came from.

    Adds sum_t d CE(theta_t + update_t; B_t) / d rule to the gradients of the rule. Gradients and
    features count as constants, so memory does not grow with the number of steps. Returns the loss
    after each step, on its own batch.
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
    """Train a problem: the loss before each step, and the parameters at the end."""
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
    """Train a network from parameters that require gradients, and keep the graph of all of it.

    Returns the loss before each step and the one after the last, each on a batch that no update has
    seen yet; differentiable in the rule's weights and in the parameters at the start.
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
    """Train a problem, and judge the run by its losses, as exactly as can be done.

    Adds d mean_t CE(theta_t; B_t) / d rule to the gradients of the rule, t over the ``steps``
    states of the network that the run made. Returns the loss after each step, on a batch that no
    update has seen yet.
    """
    start = [p.detach().clone().requires_grad_() for p in problem.module.parameters()]
    losses = unrolled(rule, problem, start, [State.fresh(p) for p in start], steps)
    made = torch.stack(losses[1:])  # the first is that of the start, whatever the rule
    made.mean().backward(inputs=list(rule.parameters()))
    return made.tolist()
