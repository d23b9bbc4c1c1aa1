"""The exact meta-gradient of a segment: back-propagation through time, second order.

Every step depends on the rule through all steps before it: by the weights it finds, by their
gradients and by the momenta. Memory grows with the segment, since each step keeps the graphs of
the network, of its gradient and of the rule. Segments are cut off from each other: what a step
does to later segments is not seen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from l2o_graph.rule import UpdateRule
from l2o_graph.step import State, update
from meta_train.tasks import Problem
from meta_train.unroll import Trajectory


def unrolled(
    rule: UpdateRule,
    problem: Problem,
    parameters: Sequence[Tensor],
    state: Sequence[State],
    age: int,
    steps: int,
) -> tuple[list[Tensor], list[Tensor], list[State]]:
    """Train a network, and keep the graph of all of it.

    Args:
        rule: The learned optimizer.
        problem: What is trained.
        parameters: Where it starts; each requires gradients.
        state: The optimizer's state there.
        age: The step whose batch comes first.
        steps: Inner steps.

    Returns:
        The loss before each step and the one after the last, each on a batch that no update has
        seen yet; then the parameters and the state at the end. All are differentiable in the
        rule's weights and in the parameters at the start.
    """
    parameters, state = list(parameters), list(state)
    losses = []
    for t in range(age, age + steps):
        losses.append(problem.loss(parameters, problem.batch(t)))
        gradients = torch.autograd.grad(losses[-1], parameters, create_graph=True)
        deltas, state = update(rule, problem.spec, parameters, gradients, state, through_time=True)
        parameters = [p + d for p, d in zip(parameters, deltas, strict=True)]
    losses.append(problem.loss(parameters, problem.batch(age + steps)))
    return losses, parameters, state


def through_time(
    rule: UpdateRule, problem: Problem, trajectory: Trajectory, steps: int
) -> list[float]:
    """Judge a segment by its losses, as exactly as it can be done.

    Adds d mean_t CE(theta_t; B_t) / d rule to the gradients of the rule, t over the ``steps``
    states of the network that the segment made.

    Returns:
        The loss after each step, on a batch that no update has seen yet.
    """
    start = [p.detach().requires_grad_() for p in trajectory.parameters]
    losses, parameters, state = unrolled(
        rule, problem, start, trajectory.state, trajectory.age, steps
    )
    made = torch.stack(losses[1:])  # the first is that of the start, whatever the rule
    made.mean().backward(inputs=list(rule.parameters()))
    trajectory.parameters = [p.detach() for p in parameters]
    trajectory.state = [State(s.momenta.detach(), s.step) for s in state]
    trajectory.age += steps
    return made.tolist()
