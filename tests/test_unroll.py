"""The two meta-gradients against plain autograd through an unroll that keeps every graph."""

import gc

import pytest
import reference
import torch
from torch import Tensor

from l2o_graph.rule import RuleConfig, UpdateRule, uncorrected
from l2o_graph.step import State, update
from meta_train.tasks import get_task
from meta_train.unroll import HOLD, Trajectory, greedy, look_ahead, loss_and_gradients


def draws_of(seed: int) -> float:
    return torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()


# Seeds whose first draw picks the first and the second of two steps.
FIRST_AND_SECOND = (
    next(s for s in range(100) if draws_of(s) < 0.5),
    next(s for s in range(100) if draws_of(s) >= 0.5),
)
CPU = torch.device("cpu")
SMALL = RuleConfig(hidden=8, layers=2, inner=4)


@pytest.fixture
def problem():
    task = get_task("fmnist_sample")
    task.load(None)
    return task.problem(3, CPU)


def random_rule(seed: int = 0) -> UpdateRule:
    torch.manual_seed(seed)
    rule = UpdateRule(SMALL)
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return rule


def meta_gradient(rule: UpdateRule) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in rule.parameters()]
    )


def with_equal_singular_values(gradient: Tensor) -> Tensor:
    white = reference.newton_schulz(gradient.flatten(1).double()).view_as(gradient)
    return (white / white.norm() * gradient.norm()).float()


def test_greedy_is_the_sum_of_one_step_gradients_on_the_same_batch(problem):
    rule, steps = random_rule(), 4
    losses = greedy(rule, problem, Trajectory.start(problem, 0, steps), steps)
    found = meta_gradient(rule)

    rule.zero_grad()
    parameters = [p.detach().clone() for p in problem.module.parameters()]
    state = [State.fresh(p) for p in parameters]
    for t in range(steps):
        _, g = loss_and_gradients(problem, parameters, problem.batch(t))
        deltas, state = update(rule, problem.spec, parameters, g, state)
        moved = [p + d for p, d in zip(parameters, deltas, strict=True)]
        loss = problem.loss(moved, problem.batch(t))
        loss.backward()
        parameters = [p.detach() for p in moved]
        assert loss.item() == pytest.approx(losses[t], rel=1e-5)
    torch.testing.assert_close(found, meta_gradient(rule), rtol=1e-4, atol=1e-6)
    assert found.abs().max() > 1e-3


def test_look_ahead_is_the_gradient_of_the_log_loss_across_each_update(problem):
    """Plain autograd through the whole segment, each tensor's update only able to turn."""
    rule, steps = random_rule(), 4
    trajectory = Trajectory.start(problem, 0, steps)
    losses = look_ahead(rule, problem, trajectory, steps, steps, torch.Generator())
    found = meta_gradient(rule)
    assert all(p.grad is None for p in rule.of_length())

    rule.zero_grad()
    nominal = uncorrected(rule)
    parameters = [p.detach().clone() for p in problem.module.parameters()]
    state, total = [State.fresh(p) for p in parameters], torch.zeros(())
    for t in range(steps):
        loss = problem.loss(parameters, problem.batch(t))
        assert loss.item() == pytest.approx(losses[t], rel=1e-5)
        total = total + loss / sum(losses)
        _, gradients = loss_and_gradients(problem, parameters, problem.batch(t))
        plain, _ = update(nominal, problem.spec, parameters, gradients, state)
        deltas, state = update(rule, problem.spec, parameters, gradients, state)
        for i, (delta, p) in enumerate(zip(deltas, plain, strict=True)):
            stretch = (delta.norm() / p.detach().norm()).log()
            total = total + HOLD * stretch.square() / len(deltas) / steps
            # Scaled to the length it has, as a constant: backward sees only how it turns. The
            # sum has to be exact, or the features of near-zero gradients come out different.
            turned = delta / delta.norm() * delta.detach().norm()
            if turned.dim() > 1:  # what arrives here is the sum of all later gradients
                turned.register_hook(with_equal_singular_values)
            parameters[i] = parameters[i] + (delta.detach() + (turned - turned.detach()))
    total.backward(inputs=rule.of_direction())
    expected = meta_gradient(rule)
    # Small singular values of a float32 gradient are inexact, and here they count like large ones.
    assert (found - expected).norm() < 2e-2 * expected.norm()
    for p, q in zip(trajectory.parameters, parameters, strict=True):
        torch.testing.assert_close(p, q.detach())
    assert found.abs().max() > 1e-4


def test_snapshots_estimate_the_same_gradient(problem):
    """Each of two steps alone, averaged, is both steps together."""
    rule, gradients = random_rule(), {}
    for snapshots, seeds in ((2, (0,)), (1, FIRST_AND_SECOND)):
        rule.zero_grad()
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            look_ahead(rule, problem, Trajectory.start(problem, 0, 2), 2, snapshots, generator)
        gradients[snapshots] = meta_gradient(rule) / len(seeds)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-3, atol=1e-6)


def test_a_trajectory_continues_where_it_stopped(problem):
    rule = random_rule()
    whole, halves = (Trajectory.start(problem, 0, 6) for _ in range(2))
    look_ahead(rule, problem, whole, 6, 1, torch.Generator())
    look_ahead(rule, problem, halves, 3, 1, torch.Generator())
    look_ahead(rule, problem, halves, 3, 1, torch.Generator())
    assert halves.age == whole.age == 6
    for p, q in zip(whole.parameters, halves.parameters, strict=True):
        assert torch.equal(p, q)


class Live:
    """Counts the bytes that autograd holds for backward, and their peak."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        return Saved(tensor, self)


class Saved:
    def __init__(self, tensor, live):
        self.tensor, self.live, self.size = tensor, live, tensor.numel() * tensor.element_size()
        live.now += self.size
        live.peak = max(live.peak, live.now)

    def __del__(self):
        self.live.now -= self.size


@pytest.mark.parametrize("estimator", ["greedy", "look_ahead"])
def test_what_autograd_holds_does_not_grow_with_the_unroll(problem, estimator):
    peaks = []
    for steps in (3, 12):
        rule, live = random_rule(), Live()
        trajectory = Trajectory.start(problem, 0, steps)
        with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda saved: saved.tensor):
            if estimator == "greedy":
                greedy(rule, problem, trajectory, steps)
            else:
                look_ahead(rule, problem, trajectory, steps, 3, torch.Generator())
        gc.collect()
        peaks.append(live.peak)
    assert peaks[0] > 0
    assert peaks[1] <= 1.05 * peaks[0]
