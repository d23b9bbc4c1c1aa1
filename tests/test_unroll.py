"""The two meta-gradients against plain autograd through an unroll that keeps every graph."""

import gc

import pytest
import torch
from torch import Tensor

from l2o_graph.rule import RuleConfig, UpdateRule
from l2o_graph.step import State, update
from meta_train.tasks import get_task
from meta_train.unroll import Trajectory, greedy, look_ahead, loss_and_gradients

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


def unrolled(rule, problem, steps):
    """Parameters before and after each step with the graph kept; gradients count as constants."""
    parameters = [p.detach().clone() for p in problem.module.parameters()]
    state, visited = [State.fresh(p) for p in parameters], [parameters]
    for t in range(steps):
        _, gradients = loss_and_gradients(problem, parameters, problem.batch(t))
        deltas, state = update(rule, problem.spec, parameters, gradients, state)
        parameters = [p + d for p, d in zip(parameters, deltas, strict=True)]
        visited.append(parameters)
    return visited


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


def test_look_ahead_is_the_gradient_of_the_mean_loss_of_the_segment(problem):
    rule, steps = random_rule(), 5
    generator = torch.Generator().manual_seed(0)
    trajectory = Trajectory.start(problem, 0, steps)
    losses = look_ahead(rule, problem, trajectory, steps, steps, generator)
    found = meta_gradient(rule)

    rule.zero_grad()
    visited = unrolled(rule, problem, steps)
    total = sum(problem.loss(visited[t], problem.batch(t)) for t in range(steps))
    (total / sum(losses)).backward()
    torch.testing.assert_close(found, meta_gradient(rule), rtol=1e-4, atol=1e-6)
    for p, q in zip(trajectory.parameters, visited[-1], strict=True):
        torch.testing.assert_close(p, q.detach())
    assert found.abs().max() > 1e-4


def test_snapshots_estimate_the_same_gradient(problem):
    rule = random_rule()
    gradients = {}
    for snapshots, draws in ((6, 1), (2, 60)):
        rule.zero_grad()
        generator = torch.Generator().manual_seed(1)
        for _ in range(draws):
            look_ahead(rule, problem, Trajectory.start(problem, 0, 6), 6, snapshots, generator)
        gradients[snapshots] = meta_gradient(rule) / draws
    cosine = torch.nn.functional.cosine_similarity(gradients[6], gradients[2], dim=0)
    ratio = gradients[2].norm() / gradients[6].norm()
    assert cosine > 0.98
    assert 0.85 < ratio < 1.15


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
