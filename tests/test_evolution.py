"""The antithetic estimate against runs with the rule moved by hand."""

import copy
import math

import pytest
import torch

from l2o_graph.rule import RuleConfig, untrained
from meta_train.evolution import SIGMA, WORST_LOSS, evolve, final_log_loss
from meta_train.tasks import get_task
from meta_train.unroll import roll_out

STEPS = 5


@pytest.fixture
def problem():
    task = get_task("fmnist_sample")
    task.load(None)
    return task.problem(3, torch.device("cpu"))


def test_the_gradient_is_a_difference_of_two_runs_along_the_noise(problem):
    rule = untrained(RuleConfig(hidden=8, layers=1, inner=4), 0)
    outcomes = evolve(rule, problem, STEPS, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    head = rule.length
    noise = [torch.randn(p.shape, generator=generator) for p in (head.weight, head.bias)]
    runs = []
    for sign in (1, -1):
        other = copy.deepcopy(rule)
        other.length.weight.data += sign * SIGMA * noise[0]
        other.length.bias.data += sign * SIGMA * noise[1]
        runs.append(math.log(roll_out(other, problem, STEPS)[0][-1]))
    assert outcomes == pytest.approx(runs)
    assert runs[0] != runs[1]
    slope = (runs[0] - runs[1]) / (2 * SIGMA)
    torch.testing.assert_close(head.weight.grad, slope * noise[0])
    torch.testing.assert_close(head.bias.grad, slope * noise[1])
    assert all(p.grad is None for p in rule.of_direction())


def test_the_rule_itself_stays_as_it_is(problem):
    rule = untrained(RuleConfig(hidden=8, layers=1, inner=4), 0)
    before = copy.deepcopy(rule.state_dict())
    evolve(rule, problem, 2, torch.Generator())
    for name, value in rule.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_pairs_add_up(problem):
    rule = untrained(RuleConfig(hidden=8, layers=1, inner=4), 0)
    gradients = []
    for seeds in ((1,), (2,), (1, 2)):
        rule.zero_grad()
        for seed in seeds:
            evolve(rule, problem, 2, torch.Generator().manual_seed(seed))
        gradients.append(rule.length.weight.grad.clone())
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2])


def test_a_run_is_judged_by_its_last_fifth_and_never_by_nan():
    assert final_log_loss([9.0] * 8 + [1.0, 3.0]) == pytest.approx(math.log(2.0))
    assert final_log_loss([2.0]) == pytest.approx(math.log(2.0))
    assert final_log_loss([1.0, math.nan]) == pytest.approx(math.log(WORST_LOSS))
    assert final_log_loss([1.0, 1e9]) == pytest.approx(math.log(WORST_LOSS))
