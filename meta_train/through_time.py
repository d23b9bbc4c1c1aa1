"""The exact meta-gradient of a training run: back-propagation through time, second order.

Every step depends on the rule through all steps before it: by the weights it finds, by their
gradients and by the momenta. Memory grows with the run, since each step keeps the graphs of the
network, of its gradient and of the rule.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from l2o_graph.paper.rule import UpdateRule
from l2o_graph.paper.step import State, update
from meta_train.tasks import Problem


def unrolled(
    rule: UpdateRule,
    problem: Problem,
    parameters: Sequence[Tensor],
    state: Sequence[State],
    steps: int,
) -> list[Tensor]:
    """Train a network, and keep the graph of all of it.

    Args:
        rule: The learned optimizer.
        problem: Problem that is trained.
        parameters: Where it starts; each requires gradients.
        state: The optimizer's state there.
        steps: Number of training steps.

    Returns:
        The loss before each step and the one after the last, each on a batch that no update has
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
    """Train a problem from its start, and judge the run by its losses, as exactly as can be done.

    Adds d mean_t CE(theta_t; B_t) / d rule to the gradients of the rule, t over the ``steps``
    states of the network that the run made.

    Returns:
        The loss after each step, on a batch that no update has seen yet.
    """
    start = [p.detach().clone().requires_grad_() for p in problem.module.parameters()]
    losses = unrolled(rule, problem, start, [State.fresh(p) for p in start], steps)
    made = torch.stack(losses[1:])  # the first is that of the start, whatever the rule
    made.mean().backward(inputs=list(rule.parameters()))
    return made.tolist()
