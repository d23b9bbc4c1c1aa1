"""Inner steps through the pure update, and the meta-gradient of what they did.

Both estimators are first-order: gradients and features count as constants, so an update depends
on the meta-weights only through the rule that computed it, and the loss after T steps changes
with the update at step s as the gradient at step T says. Memory does not grow with T.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o_graph.features import TINY
from l2o_graph.rule import UpdateRule, uncorrected
from l2o_graph.step import State, update
from meta_train.tasks import Problem

# How firmly the length of updates is held: a tenth off costs as much as 1 % of loss.
HOLD = 1.0

# Updates that a judged update is followed for, and batches that it is judged by.
REACH = float(__import__("os").environ.get("REACH", "10"))
BATCHES_AHEAD = 2


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
    """Judge the direction of updates by where they lead when they are kept up for a while.

    Adds to the gradients of the rule that of the mean of log CE(theta_s + REACH update_s; B),
    over ``snapshots`` of the steps, drawn one from each equal share of them, with B the batches
    that follow. REACH updates are about what a momentum lasts for; the loss that far out knows
    the curvature that the gradient here does not.

    Only the direction is learned from it: the gradient's component along a tensor's update is
    dropped, and the update's length is held near the nominal one's by the square of the
    logarithm of their ratio. How long steps should be cannot be told from so close: what noise
    does to the loss at once counts in full, what progress does to it later does not, and rules
    that learn their length from it stop long before the network is trained.

    Returns:
        The loss before each step, on a batch that no update has seen yet.
    """
    share = steps / snapshots
    draws = torch.rand(snapshots, generator=generator).tolist()
    chosen = {int((i + draw) * share) for i, draw in enumerate(draws)}
    nominal = uncorrected(rule)
    losses = []
    for t in range(steps):
        parameters, state = trajectory.parameters, trajectory.state
        loss, gradients = loss_and_gradients(problem, parameters, problem.batch(trajectory.age))
        losses.append(loss.item())
        trajectory.age += 1
        judged = t in chosen
        with torch.set_grad_enabled(judged):
            deltas, trajectory.state = update(rule, problem.spec, parameters, gradients, state)
        trajectory.parameters = [p + d.detach() for p, d in zip(parameters, deltas, strict=True)]
        if not judged:
            continue
        with torch.no_grad():
            plain, _ = update(nominal, problem.spec, parameters, gradients, state)
        far = [p + REACH * d.detach() for p, d in zip(parameters, deltas, strict=True)]
        turned, held = torch.zeros(()), torch.zeros(())
        for k in range(BATCHES_AHEAD):
            batch = problem.batch(trajectory.age + k)
            loss, slopes = loss_and_gradients(problem, far, batch)
            weight = REACH / (loss * BATCHES_AHEAD)  # d log L = dL / L
            turned = turned + sum(
                (weight * across(v, d) * d).sum() for v, d in zip(slopes, deltas, strict=True)
            )
        held = torch.stack([log_ratio(d, p).square() for d, p in zip(deltas, plain, strict=True)])
        ((turned + HOLD * held.mean()) / snapshots).backward()
    return losses


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
