"""Inner steps through the pure update, and the meta-gradient of what they did.

Both estimators here are first-order: gradients and features count as constants, so an update
depends on the meta-weights only through the rule that computed it, and the loss after T steps
changes with the update at step s as the gradient at step T says. Memory does not grow with T.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o_graph.features import TINY, whitener
from l2o_graph.rule import UpdateRule, uncorrected
from l2o_graph.step import State, update
from meta_train.tasks import Problem

# How firmly the length of updates is held: a tenth off costs as much as 1 % of loss.
HOLD = 1.0


@dataclass(slots=True)
class Trajectory:
    """A network on its way: where it is and what its optimizer remembers.

    Attributes:
        seed: What the problem was made from.
        length: Inner steps after which it ends.
        age: Inner steps so far.
        parameters: The network's parameters, detached.
        state: The optimizer's state for each.
    """

    seed: int
    length: int
    age: int
    parameters: list[Tensor]
    state: list[State]

    @staticmethod
    def start(problem: Problem, seed: int, length: int) -> "Trajectory":
        """At the problem's initialisation."""
        parameters = [p.detach().clone() for p in problem.module.parameters()]
        return Trajectory(seed, length, 0, parameters, [State.fresh(p) for p in parameters])


def loss_and_gradients(
    problem: Problem, parameters: Sequence[Tensor], batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Loss on a batch, detached, and its gradients."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    loss = problem.loss(leaves, batch)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def greedy(rule: UpdateRule, problem: Problem, trajectory: Trajectory, steps: int) -> list[float]:
    """The paper's meta-gradient: each update is judged on the very batch that it came from.

    Adds sum_t d CE(theta_t + update_t; B_t) / d rule to the gradients of the rule.

    Returns:
        The loss after each step, on its own batch.
    """
    losses = []
    for _ in range(steps):
        batch = problem.batch(trajectory.age)
        _, gradients = loss_and_gradients(problem, trajectory.parameters, batch)
        deltas, trajectory.state = update(
            rule, problem.spec, trajectory.parameters, gradients, trajectory.state
        )
        moved = [p + d for p, d in zip(trajectory.parameters, deltas, strict=True)]
        loss = problem.loss(moved, batch)
        loss.backward()
        trajectory.parameters = [p.detach() for p in moved]
        trajectory.age += 1
        losses.append(loss.item())
    return losses


def look_ahead(
    rule: UpdateRule,
    problem: Problem,
    trajectory: Trajectory,
    steps: int,
    snapshots: int,
    generator: torch.Generator,
) -> list[float]:
    """Judge the direction of updates by the losses on all later batches of the segment.

    Adds to the gradients of the rule that of mean_t log CE(theta_t; B_t), t over the segment,
    by way of the updates at ``snapshots`` of its steps, drawn one from each equal share of it:
    the gradient with respect to the update at step s is the sum of the gradients at t > s, less
    its component along that update, tensor by tensor. That component says how long a step
    should be, and says it wrong: what noise does to the weights looks permanent where curvature
    is left out, and a segment sees only so far. Rules that were trained on it made their steps
    shorter and shorter, until networks stopped training. Instead the length of each tensor's
    update is held near that of the nominal direction, by the square of the logarithm of their
    ratio, and how long a step should be is left to ``evolution``.

    A kernel's later gradients count with all their singular values alike (``steepest``). In
    plain coordinates the best update would repeat their few large ones and undo what makes the
    nominal direction good.

    Returns:
        The loss before each step, on a batch that no update has seen yet.
    """
    share = steps / snapshots
    draws = torch.rand(snapshots, generator=generator).tolist()
    chosen = {int((i + draw) * share) for i, draw in enumerate(draws)}
    kept: list[tuple[list[Tensor], list[Tensor], list[State], list[Tensor]]] = []
    passed = [torch.zeros_like(p) for p in trajectory.parameters]  # sum of gradients so far
    losses = []
    for t in range(steps):
        batch = problem.batch(trajectory.age)
        loss, gradients = loss_and_gradients(problem, trajectory.parameters, batch)
        losses.append(loss.item())
        passed = [s + g for s, g in zip(passed, gradients, strict=True)]
        if t in chosen:
            kept.append((trajectory.parameters, gradients, trajectory.state, passed))
        with torch.no_grad():
            deltas, trajectory.state = update(
                rule, problem.spec, trajectory.parameters, gradients, trajectory.state
            )
        trajectory.parameters = [p + d for p, d in zip(trajectory.parameters, deltas, strict=True)]
        trajectory.age += 1
    # d log L = dL / L, with the mean loss of the segment because single batches are noisy.
    weight = steps / sum(losses)
    nominal = uncorrected(rule)
    for parameters, gradients, state, before in kept:
        deltas, _ = update(rule, problem.spec, parameters, gradients, state)
        with torch.no_grad():
            plain, _ = update(nominal, problem.spec, parameters, gradients, state)
        later = [weight * steepest(end - at) for end, at in zip(passed, before, strict=True)]
        turned = sum((across(v, d) * d).sum() for v, d in zip(later, deltas, strict=True))
        stretched = [log_ratio(d, p).square() for d, p in zip(deltas, plain, strict=True)]
        blame = turned + HOLD * torch.stack(stretched).mean()
        (blame / snapshots).backward(inputs=rule.of_direction())
    return losses


@torch.no_grad()
def steepest(gradient: Tensor) -> Tensor:
    """The direction of steepest ascent in spectral norm, as long as the gradient.

    For what is not a kernel, the gradient itself.
    """
    if gradient.dim() < 2:
        return gradient
    matrix = gradient.flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    q = whitener(matrix @ matrix.T if wide else matrix.T @ matrix)
    white = q @ matrix if wide else matrix @ q
    return (white * (matrix.norm() / (white.norm() + TINY))).view_as(gradient)


@torch.no_grad()
def across(vector: Tensor, direction: Tensor) -> Tensor:
    """The part of a tensor orthogonal to another."""
    along = (vector * direction).sum() / (direction.square().sum() + TINY)
    return vector - along * direction


def log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Logarithm of the ratio of two norms."""
    return 0.5 * ((a.square().sum() + TINY) / (b.square().sum() + TINY)).log()


def roll_out(rule: UpdateRule, problem: Problem, steps: int) -> tuple[list[float], list[Tensor]]:
    """Train a problem from its start.

    Returns:
        The loss before each step, and the parameters at the end.
    """
    trajectory = Trajectory.start(problem, 0, steps)
    losses = []
    for t in range(steps):
        loss, gradients = loss_and_gradients(problem, trajectory.parameters, problem.batch(t))
        losses.append(loss.item())
        with torch.no_grad():
            deltas, trajectory.state = update(
                rule, problem.spec, trajectory.parameters, gradients, trajectory.state
            )
        trajectory.parameters = [p + d for p, d in zip(trajectory.parameters, deltas, strict=True)]
    return losses, trajectory.parameters
