"""The second-order mode of the update, and the meta-gradient that back-propagates through it."""

import dataclasses

import pytest
import torch
from conftest import random_like, random_rule
from helpers_optimizer import MODELS, equal, mlp
from helpers_unroll import TinyProblem, flat
from torch import Tensor, nn

from l2o_graph.inference import spec_of_module
from l2o_graph.rule import RuleConfig, UpdateRule
from l2o_graph.step import State, update
from l2o_graph.tracing.network import spec_of_computation
from l2o_graph.zoo.registry import load_checkpoint
from meta_train.config import MetaConfig
from meta_train.through_time import through_time, unrolled
from meta_train.trainer import meta_train
from meta_train.unroll import Trajectory

STEPS = 4
SMALL = RuleConfig(hidden=8, layers=2, inner=8)
CONFIGS = [dataclasses.replace(SMALL, model=model) for model in MODELS]
SQUASHED = dataclasses.replace(SMALL, model="ff", direction="squashed")
PAPER = dataclasses.replace(SMALL, preset="paper")


def name(config: RuleConfig) -> str:
    return f"{config.model}-{config.preset}-{config.direction}"


def fresh(parameters: list[Tensor], dtype: torch.dtype = torch.float32) -> list[State]:
    states = [State.fresh(p) for p in parameters]
    return [State(s.momenta.to(dtype), s.step) for s in states]


def mean_loss(rule: UpdateRule, problem: TinyProblem, start: list[Tensor]) -> Tensor:
    """Momenta in float64: rounded to float32 they are steps, which have no slope."""
    losses, _, _ = unrolled(rule, problem, start, fresh(start, torch.float64), 0, STEPS)
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


@pytest.mark.parametrize("config", [*CONFIGS, SQUASHED, PAPER], ids=name)
def test_the_meta_gradient_is_the_slope_in_the_rule_and_in_the_start(config):
    rule, problem = random_rule(config), TinyProblem(mlp(dtype=torch.float64))
    start, weights = problem.start(), list(rule.parameters())
    loss = mean_loss(rule, problem, start)
    found = torch.autograd.grad(loss, [*weights, *start], allow_unused=True)
    for where, gradient in ((weights, found[: len(weights)]), (start, found[len(weights) :])):
        gradient = flat(gradient, where)
        for seed in range(3):
            direction = random_like(where, seed)
            expected = slope(lambda: mean_loss(rule, problem, start), where, direction, 1e-8)
            # The gate of parameters without a gradient is a ten-thousandth wide.
            error = abs(gradient @ flat(direction, where) - expected)
            assert error < 3e-5 * gradient.norm()


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_updates_are_the_same_with_and_without_the_graph(config):
    rule, network = random_rule(config).float(), mlp()
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


def test_a_parameter_without_a_gradient_is_read_and_left_as_it_is():
    rule, network = random_rule(SMALL), mlp(dtype=torch.float64)
    spec, parameters = spec_of_module(network), list(network.parameters())
    gradients = random_like(parameters, 0)
    _, state = update(rule, spec, parameters, gradients, fresh(parameters))
    without = [None, *gradients[1:]]
    deltas, after = update(rule, spec, parameters, without, state)
    assert not deltas[0].any() and all(d.any() for d in deltas[1:])
    assert after[0] is state[0]
    assert [s.step.item() for s in after] == [1, 2, 2, 2]
    others = [parameters[0] + 1, *parameters[1:]]
    assert not equal(deltas[1:], update(rule, spec, others, without, state)[0][1:])


# Where slopes are infinite ----------------------------------------------------------------------


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


@pytest.mark.parametrize("config", [SMALL, SQUASHED, PAPER], ids=name)
@pytest.mark.parametrize(
    "network", [zero_biases, dead_layer, dead_neuron, zero_output, tiny_gradients, dead_group]
)
def test_the_meta_gradient_is_finite_where_features_jump(network, config):
    network = network()
    problem = TinyProblem(network, spec_of_computation(network, (torch.zeros(2, 4),)))
    rule, start = random_rule(config).float(), problem.start()
    losses, _, _ = unrolled(rule, problem, start, fresh(start), 0, STEPS)
    weights = list(rule.parameters())
    found = torch.autograd.grad(sum(losses), [*weights, *start], allow_unused=True)
    for gradient, where in ((found[: len(weights)], weights), (found[len(weights) :], start)):
        norm = flat(gradient, where).norm()
        assert 1e-3 < norm < 1e3  # so that a mere "finite", as 1e15, is not enough


# The estimator ----------------------------------------------------------------------------------


def test_through_time_adds_the_gradient_of_the_mean_loss_and_moves_on():
    rule, problem = random_rule(SMALL), TinyProblem(mlp(dtype=torch.float64))
    whole, halves = (Trajectory.start(problem, 0, 6) for _ in range(2))
    losses, parameters, state = unrolled(rule, problem, problem.start(), whole.state, 0, 6)
    (sum(losses[1:]) / 6).backward()
    expected = [p.grad.clone() for p in rule.parameters()]

    reported = through_time(rule, problem, whole, 6)
    assert reported == [loss.item() for loss in losses[1:]]
    for p, g in zip(rule.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * g, rtol=1e-9, atol=1e-12)

    assert through_time(rule, problem, halves, 3) == reported[:3]
    assert through_time(rule, problem, halves, 3) == reported[3:]
    for trajectory in (whole, halves):
        assert trajectory.age == 6
        assert equal(trajectory.parameters, parameters)
        assert equal([s.momenta for s in trajectory.state], [s.momenta for s in state])
        assert not any(t.requires_grad for t in trajectory.parameters)
        assert not any(s.momenta.requires_grad for s in trajectory.state)


@pytest.mark.parametrize("model", MODELS)
def test_the_trainer_learns_through_time(model, tmp_path):
    config = MetaConfig(
        task="fmnist_sample:width=4,batch=16", rule=dataclasses.replace(SMALL, model=model),
        outer_steps=2, estimator="through_time", unroll=3, snapshots=1, trajectories=1, shortest=3,
        longest=6, pairs=0, warmup=0, evaluate_steps=2, evaluate_seeds=1,
    )  # fmt: skip
    result = meta_train(config, tmp_path / "run")
    assert result.finished and result.checkpoint is not None
    learned = load_checkpoint(result.checkpoint).rule
    assert any(p.any() for p in learned.of_length())  # zeros at the start
    assert learned.head.last.weight.any()
