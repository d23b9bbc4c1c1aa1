"""The pure update: slow twins, state, and what it is differentiable in."""

import pytest
import torch
from support import reference
from support.rules import random_like, random_rule
from torch import nn

from l2o_graph.layout.spec import NetSpec
from l2o_graph.paper.features import next_momenta
from l2o_graph.paper.rule import PAPER, RuleConfig
from l2o_graph.paper.step import State, moved, update
from l2o_graph.tracing.by_order import spec_of_module

RULES = {model: random_rule(RuleConfig(model, hidden=8, layers=2, inner=8)) for model in PAPER}


def small_cnn() -> nn.Sequential:
    """Kernels tall, square and wide, sets of one size, a norm and a flattened map."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, (2, 1), bias=False),
        nn.BatchNorm2d(5),
        nn.Conv2d(5, 5, 1),
        nn.Flatten(),
        nn.Linear(5 * 3, 5),
    ).double()


def prepared(network: nn.Module) -> tuple[NetSpec, list[torch.Tensor]]:
    return spec_of_module(network), [p.detach() for p in network.parameters()]


def several_steps(rule, spec, parameters, history) -> list[list[torch.Tensor]]:
    """The updates of one step after another; the parameters stay where they are."""
    state = [State.fresh(p) for p in parameters]
    answer = []
    for gradients in history:
        deltas, state = update(rule, spec, parameters, gradients, state)
        answer.append(deltas)
    return answer


# NG-T and NFN are beside slow twins of their layers in tests of their own.
@pytest.mark.parametrize("model", ["ng_gnn", "lstm", "ff"])
def test_whole_step_equals_the_slow_twin(model):
    network = small_cnn()
    spec, parameters = prepared(network)
    history = [random_like(parameters, seed) for seed in range(3)]
    for gradients in history:
        gradients[0][1, 0, 1] = 0  # never a gradient
    rule = RULES[model]
    found = several_steps(rule, spec, parameters, history)
    for step in range(len(history)):
        histories = list(zip(*history[: step + 1], strict=True))
        if model == "ng_gnn":
            expected = reference.update(rule, network, histories)
        else:
            expected = reference.update_without_graph(rule, parameters, histories)
        for delta, slow in zip(found[step], expected, strict=True):
            torch.testing.assert_close(delta, slow, rtol=1e-6, atol=1e-9)


def test_the_whole_step_of_a_network_with_loose_parameters_equals_the_slow_twin():
    network = nn.Sequential(nn.LayerNorm(5)).double()
    spec, parameters = prepared(network)
    assert spec.loose
    history = [random_like(parameters, seed) for seed in range(2)]
    found = several_steps(RULES["ff"], spec, parameters, history)[-1]
    slow = reference.update_without_graph(RULES["ff"], parameters, list(zip(*history, strict=True)))
    for a, b in zip(found, slow, strict=True):
        torch.testing.assert_close(a, b)


def test_state_takes_in_the_gradient_and_counts():
    spec, parameters = prepared(small_cnn())
    state = [State.fresh(p) for p in parameters]
    history = [random_like(parameters, seed) for seed in range(3)]
    momenta = [s.momenta for s in state]
    for step, gradients in enumerate(history):
        _, after = update(RULES["ng_gnn"], spec, parameters, gradients, state)
        momenta = [next_momenta(m, g) for m, g in zip(momenta, gradients, strict=True)]
        for s, before, m in zip(after, state, momenta, strict=True):
            assert before.step == step and s.step == step + 1
            assert s.momenta.dtype == torch.float64
            assert torch.equal(s.momenta, m)
        state = after


def test_a_parameter_without_a_gradient_is_read_and_left_as_it_is():
    spec, parameters = prepared(small_cnn())
    rule, gradients = RULES["ng_gnn"], random_like(parameters, 0)
    _, state = update(rule, spec, parameters, gradients, [State.fresh(p) for p in parameters])
    without = [None, *gradients[1:]]
    deltas, after = update(rule, spec, parameters, without, state)
    assert not deltas[0].any() and all(d.any() for d in deltas[1:])
    assert after[0] is state[0]
    assert [s.step.item() for s in after] == [1, *[2] * (len(parameters) - 1)]
    others = [3 * parameters[0] + 1, *parameters[1:]]
    found, _ = update(rule, spec, others, without, state)
    assert not torch.allclose(deltas[1], found[1], rtol=1e-6)


@pytest.mark.parametrize("model", RULES)
def test_update_writes_nothing_in_place(model):
    spec, parameters = prepared(small_cnn())
    gradients, state = random_like(parameters, 0), [State.fresh(p) for p in parameters]
    given = [*parameters, *gradients, *[s.momenta for s in state], *[s.step for s in state]]
    copies = [t.clone() for t in given]
    update(RULES[model], spec, parameters, gradients, state)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


@pytest.mark.parametrize("model", RULES)
def test_gradients_reach_every_weight_of_the_rule_and_nothing_else(model):
    spec, parameters = prepared(small_cnn())
    parameters = [p.requires_grad_() for p in parameters]
    gradients = [g.requires_grad_() for g in random_like(parameters, 0)]
    state = [State.fresh(p) for p in parameters]
    for s in state:
        s.momenta.requires_grad_()
    deltas, after = update(RULES[model], spec, parameters, gradients, state)
    targets = random_like(deltas, 1)
    loss = sum((d * t).sum() for d, t in zip(deltas, targets, strict=True))
    reached = torch.autograd.grad(loss, list(RULES[model].parameters()), allow_unused=True)
    for (name, _), g in zip(RULES[model].named_parameters(), reached, strict=True):
        assert g is not None and g.isfinite().all() and g.any(), name
    outside = [*parameters, *gradients, *[s.momenta for s in state]]
    unused = torch.autograd.grad(loss, outside, allow_unused=True)
    assert all(g is None for g in unused)
    assert not any(s.momenta.requires_grad for s in after)


def test_gradient_in_a_weight_of_the_rule_is_the_slope():
    spec, parameters = prepared(small_cnn())
    gradients, state = random_like(parameters, 0), [State.fresh(p) for p in parameters]
    rule = RULES["ng_gnn"]

    def loss() -> torch.Tensor:
        deltas, _ = update(rule, spec, parameters, gradients, state)
        return sum((d * t).sum() for d, t in zip(deltas, random_like(deltas, 1), strict=True))

    for weight in (rule.head.layers[-1].bias, rule.reader.backbone.layers[0].film.weight):
        (slope,) = torch.autograd.grad(loss(), weight)
        entry, small = weight.data.view(-1)[:1], 1e-6
        with torch.no_grad():
            entry += small
            above = loss()
            entry -= 2 * small
            below = loss()
            entry += small
        torch.testing.assert_close(
            (above - below) / (2 * small), slope.view(-1)[0], rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e4, 1e8])
@pytest.mark.parametrize("model", RULES)
def test_updates_stay_finite_whatever_the_gradients(model, scale):
    spec, parameters = prepared(small_cnn())
    parameters = [p.float() for p in parameters]
    history = [[scale * g.float() for g in random_like(parameters, s)] for s in range(3)]
    rule = random_rule(RULES[model].config).float()
    for deltas in several_steps(rule, spec, parameters, history):
        assert all(delta.isfinite().all() for delta in deltas)


@pytest.mark.parametrize("model", RULES)
def test_a_float32_rule_agrees_with_a_float64_rule(model):
    spec, parameters = prepared(small_cnn())
    gradients, state = random_like(parameters, 0), [State.fresh(p) for p in parameters]
    expected, _ = update(RULES[model], spec, parameters, gradients, state)
    rule = random_rule(RULES[model].config).float()
    found, _ = update(rule, spec, parameters, gradients, state)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 1e-3 * b.abs().max()


@pytest.mark.parametrize("model", RULES)
def test_a_weight_of_zero_is_still_an_edge(model):
    """Zeroing a weight changes its features, not who talks to whom: the answer is continuous."""
    spec, parameters = prepared(small_cnn())
    gradients, state = random_like(parameters, 0), [State.fresh(p) for p in parameters]
    answers = []
    for weight in (0.0, 1e-12):
        parameters[3][0, 0] = weight
        answers.append(update(RULES[model], spec, parameters, gradients, state)[0])
    for zero, tiny in zip(*answers, strict=True):
        torch.testing.assert_close(zero, tiny, rtol=1e-5, atol=1e-7)


def test_weights_are_moved_as_decoupled_weight_decay_says():
    weights, step = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25])
    found = moved(weights, step, 0.1, 0.2)
    torch.testing.assert_close(found, weights * (1 - 0.1 * 0.2) + 0.1 * step)
    tensors = moved(weights, step, torch.tensor([0.1]), torch.tensor(0.2))
    torch.testing.assert_close(tensors, found)
