"""The second-order mode of the update, and the meta-gradient that back-propagates through it."""

from dataclasses import replace

import pytest
import torch
from support.optimizers import MODELS, equal, mlp
from support.rules import random_like, random_rule
from support.unroll import TinyProblem, flat
from torch import Tensor, nn

from l2o_graph.paper.checkpoints import load_checkpoint
from l2o_graph.paper.rule import RuleConfig, UpdateRule
from l2o_graph.paper.step import State, update
from l2o_graph.tracing.by_order import spec_of_module
from l2o_graph.tracing.network import spec_of_computation
from meta_train.config import MetaConfig
from meta_train.trainer import meta_train
from meta_train.unroll import through_time, unrolled

STEPS = 4
CONFIGS = {model: RuleConfig(model, hidden=8, layers=2, inner=8) for model in MODELS}


def fresh(parameters: list[Tensor], dtype: torch.dtype = torch.float32) -> list[State]:
    states = [State.fresh(p) for p in parameters]
    return [State(s.momenta.to(dtype), s.step) for s in states]


def mean_loss(rule: UpdateRule, problem: TinyProblem, start: list[Tensor]) -> Tensor:
    """Momenta in float64: rounded to float32 they are steps, which have no slope."""
    losses = unrolled(rule, problem, start, fresh(start, torch.float64), STEPS)
    return torch.stack(losses[1:]).mean()


def slope(f, where: list[Tensor], direction: list[Tensor], h: float) -> float:
    """Central differences of fourth order."""

    def at(share: float) -> float:
        with torch.no_grad():
            for p, d in zip(where, direction, strict=True):
                p.add_(d, alpha=share * h)
        value = f().item()
        with torch.no_grad():
            for p, d in zip(where, direction, strict=True):
                p.sub_(d, alpha=share * h)
        return value

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)


@pytest.mark.parametrize("model", MODELS)
def test_the_meta_gradient_is_the_slope_in_the_rule_and_in_the_start(model):
    rule, problem = random_rule(CONFIGS[model]), TinyProblem(mlp(dtype=torch.float64))
    start, weights = problem.start(), list(rule.parameters())
    loss = mean_loss(rule, problem, start)
    found = torch.autograd.grad(loss, [*weights, *start], allow_unused=True)
    for where, gradient in ((weights, found[: len(weights)]), (start, found[len(weights) :])):
        gradient = flat(gradient, where)
        for seed in range(2):
            direction = random_like(where, seed)
            expected = slope(lambda: mean_loss(rule, problem, start), where, direction, 1e-8)
            error = abs(gradient @ flat(direction, where) - expected)
            assert error < 3e-5 * gradient.norm()


@pytest.mark.parametrize("model", MODELS)
def test_updates_are_the_same_with_and_without_the_graph(model):
    rule, network = random_rule(CONFIGS[model]).float(), mlp()
    parameters = list(network.parameters())
    outcomes = []
    for mode in (False, True):
        state = fresh(parameters)
        for seed in range(3):
            gradients = random_like(parameters, seed, torch.float32)
            deltas, state = update(
                rule, spec_of_module(network), parameters, gradients, state, through_time=mode
            )
        outcomes.append([*deltas, *[s.momenta for s in state], *[s.step for s in state]])
    assert equal(*outcomes)


# Where slopes are steep -------------------------------------------------------------------------


def relu_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def zero_biases() -> nn.Module:
    network = relu_mlp()
    for layer in (network[0], network[2], network[4]):
        nn.init.zeros_(layer.bias)
    return network


def dead_layer() -> nn.Module:
    network = relu_mlp()
    nn.init.constant_(network[0].bias, -100)
    return network


def dead_neuron() -> nn.Module:
    network = relu_mlp()
    network[2].bias.data[1] = -100
    return network


def zero_output() -> nn.Module:
    network = relu_mlp()
    nn.init.zeros_(network[4].weight)
    return network


def tiny_gradients() -> nn.Module:
    network = relu_mlp()
    network[4].weight.data *= 1e-16
    return network


def dead_group() -> nn.Module:
    """The second of two groups reads what is always 0."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Unflatten(1, (4, 1, 1)),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    network[1].bias.data[2:] = -100
    nn.init.ones_(network[3].bias)
    return network


@pytest.mark.parametrize("model", ["ng_gnn", "ff"])
@pytest.mark.parametrize(
    "network", [zero_biases, dead_layer, dead_neuron, zero_output, tiny_gradients, dead_group]
)
def test_the_meta_gradient_is_finite_where_features_bend(network, model):
    network = network()
    problem = TinyProblem(network, spec_of_computation(network, (torch.zeros(2, 4),)))
    rule, start = random_rule(CONFIGS[model]).float(), problem.start()
    losses = unrolled(rule, problem, start, fresh(start), STEPS)
    weights = list(rule.parameters())
    found = torch.autograd.grad(sum(losses), [*weights, *start], allow_unused=True)
    for gradient, where in ((found[: len(weights)], weights), (found[len(weights) :], start)):
        norm = flat(gradient, where).norm()
        assert 1e-3 < norm < 1e3  # so that a mere "finite", as 1e15, is not enough


# The estimator ----------------------------------------------------------------------------------


def test_through_time_adds_the_gradient_of_the_mean_loss():
    rule, problem = random_rule(CONFIGS["ng_gnn"]), TinyProblem(mlp(dtype=torch.float64))
    start = problem.start()
    losses = unrolled(rule, problem, start, [State.fresh(p) for p in start], 6)
    (sum(losses[1:]) / 6).backward()
    expected = [p.grad.clone() for p in rule.parameters()]

    assert through_time(rule, problem, 6) == [loss.item() for loss in losses[1:]]
    for p, g in zip(rule.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * g, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in problem.module.parameters())


def test_the_trainer_learns_through_time(tmp_path):
    config = MetaConfig(
        task="fmnist_sample:width=4,batch=16", rule=CONFIGS["ng_gnn"], outer_steps=2,
        estimator="through_time", unroll=3, evaluate_steps=2, evaluate_seeds=1,
    )  # fmt: skip
    ends = []
    for outer_steps in (0, 2):
        changed = replace(config, outer_steps=outer_steps)
        result = meta_train(changed, tmp_path / f"run{outer_steps}")
        assert result.finished and result.checkpoint is not None
        ends.append(load_checkpoint(result.checkpoint).rule)
    pairs = zip(ends[0].parameters(), ends[1].parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)
