"""The paper's meta-gradient against plain autograd, and training runs through the pure update."""

import gc

import pytest
import torch
from support.rules import random_rule
from torch import Tensor

from l2o_graph import PaperOptimizer
from l2o_graph.paper.rule import RuleConfig, UpdateRule
from l2o_graph.paper.step import State, update
from meta_train.tasks import get_task
from meta_train.unroll import greedy, loss_and_gradients, roll_out

SMALL = RuleConfig(hidden=8, layers=2, inner=4)


@pytest.fixture
def problem():
    task = get_task("fmnist_sample:width=4,batch=16")
    task.load(None)
    return task.problem(3, torch.device("cpu"))


def rule_of() -> UpdateRule:
    return random_rule(SMALL).float()


def meta_gradient(rule: UpdateRule) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in rule.parameters()]
    )


def test_greedy_is_the_sum_of_one_step_gradients_on_the_same_batch(problem):
    rule, steps = rule_of(), 4
    losses = greedy(rule, problem, steps)
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


def test_a_run_is_that_of_the_optimizer_and_leaves_the_problem_as_it_is(problem):
    rule = rule_of()
    before = [p.detach().clone() for p in problem.module.parameters()]
    losses, end = roll_out(rule, problem, 3)
    assert all(torch.equal(a, b) for a, b in zip(problem.module.parameters(), before, strict=True))
    optimizer = PaperOptimizer(problem.module.parameters(), checkpoint=rule)
    parameters = list(problem.module.parameters())
    for t in range(3):
        optimizer.zero_grad()
        loss = problem.loss(parameters, problem.batch(t))
        assert loss.item() == pytest.approx(losses[t], rel=1e-5)
        loss.backward()
        optimizer.step()
    for a, b in zip(parameters, end, strict=True):
        torch.testing.assert_close(a.detach(), b)


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


def test_what_autograd_holds_does_not_grow_with_the_unroll(problem):
    peaks = []
    for steps in (3, 12):
        rule, live = rule_of(), Live()
        with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda saved: saved.tensor):
            greedy(rule, problem, steps)
        gc.collect()
        peaks.append(live.peak)
    assert peaks[0] > 0
    assert peaks[1] <= 1.05 * peaks[0]
