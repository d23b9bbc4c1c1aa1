import math

import pytest
import reference
import torch
from conftest import random_like, random_rule
from torch import nn

from l2o_graph.architecture import NetSpec
from l2o_graph.features import next_momenta
from l2o_graph.inference import spec_of_module
from l2o_graph.rule import (
    DIRECTION_GAIN,
    HALVED_AFTER,
    KERNEL_STEP,
    VECTOR_STEP,
    RuleConfig,
    UpdateRule,
    uncorrected,
)
from l2o_graph.step import State, update, updates


def all_heads_at_zero(rule: UpdateRule) -> UpdateRule:
    plain = uncorrected(rule)
    for p in plain.of_length():
        p.detach().zero_()
    return plain


SMALL = RuleConfig(hidden=8, layers=2, inner=8)
RULES = {
    "nominal": random_rule(SMALL),
    "paper": random_rule(RuleConfig("paper", hidden=8, layers=2, inner=8)),
}


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


def test_whole_step_equals_the_slow_twin():
    network = small_cnn()
    spec, parameters = prepared(network)
    history = [random_like(parameters, seed) for seed in range(3)]
    for gradients in history:
        gradients[0][1, 0, 1] = 0  # never a gradient: stays where it is
    rule = RULES["nominal"]
    found = several_steps(rule, spec, parameters, history)
    for step in range(len(history)):
        so_far = list(zip(*history[: step + 1], strict=True))
        expected = reference.update(rule, network, so_far)
        for a, b in zip(found[step], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [UpdateRule(SMALL).double(), all_heads_at_zero(RULES["nominal"])],
    ids=["untrained", "heads at zero"],
)
def test_nominal_step_is_muon_for_kernels_and_momentum_over_rms_for_vectors(rule):
    network = small_cnn()
    spec, parameters = prepared(network)
    history = [random_like(parameters, seed) for seed in range(4)]
    deltas = several_steps(rule, spec, parameters, history)[-1]
    for delta, gradients in zip(deltas, zip(*history, strict=True), strict=True):
        momentum = torch.zeros_like(delta)
        for g in gradients:
            momentum = 0.9 * momentum + g
        follow = gradients[-1] + 0.9 * momentum
        if delta.dim() > 1:
            matrix = follow.flatten(1)
            orthogonal = reference.newton_schulz(matrix) * max(matrix.shape) ** 0.5
            expected = -KERNEL_STEP / matrix.shape[1] ** 0.5 * orthogonal.view_as(delta)
        else:
            expected = -VECTOR_STEP * follow / follow.square().mean().sqrt()
        expected /= 1 + (len(history) - 1) / HALVED_AFTER
        torch.testing.assert_close(delta, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("preset", RULES)
@pytest.mark.parametrize("chunk_size", [1, 5, 20, 60])
def test_chunks_change_nothing_and_bound_each_run(preset, chunk_size):
    spec, parameters = prepared(small_cnn())
    gradients = random_like(parameters, 0)
    state = [State.fresh(p) for p in parameters]
    deltas, state = update(RULES[preset], spec, parameters, gradients, state)
    step_before = [State(s.momenta, s.step - 1) for s in state]
    row = {k.parameter: parameters[k.parameter][0].numel() for k in spec.kernels}
    whole = {b.parameter: parameters[b.parameter].numel() for b in spec.biases}
    found = [torch.full_like(p, math.nan).flatten() for p in parameters]
    for part, run in updates(RULES[preset], spec, parameters, gradients, step_before, chunk_size):
        least = row.get(part.parameter, whole.get(part.parameter, 1))
        assert part.stop - part.start <= max(chunk_size, least)
        assert found[part.parameter][part.start : part.stop].isnan().all(), "written twice"
        found[part.parameter][part.start : part.stop] = run
    for a, b in zip(found, deltas, strict=True):
        torch.testing.assert_close(a, b.flatten(), rtol=1e-9, atol=1e-12)


def test_state_takes_in_the_gradient_and_counts():
    spec, parameters = prepared(small_cnn())
    state = [State.fresh(p) for p in parameters]
    history = [random_like(parameters, seed) for seed in range(3)]
    momenta = [s.momenta for s in state]
    for step, gradients in enumerate(history):
        _, after = update(RULES["nominal"], spec, parameters, gradients, state)
        momenta = [next_momenta(m, g) for m, g in zip(momenta, gradients, strict=True)]
        for s, before, m in zip(after, state, momenta, strict=True):
            assert before.step == step and s.step == step + 1
            assert s.momenta.dtype == torch.float64
            assert torch.equal(s.momenta, m)
        state = after


@pytest.mark.parametrize("preset", RULES)
def test_update_writes_nothing_in_place(preset):
    spec, parameters = prepared(small_cnn())
    gradients, state = random_like(parameters, 0), [State.fresh(p) for p in parameters]
    given = [*parameters, *gradients, *[s.momenta for s in state], *[s.step for s in state]]
    copies = [t.clone() for t in given]
    update(RULES[preset], spec, parameters, gradients, state)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


def test_without_any_gradient_nothing_moves():
    spec, parameters = prepared(small_cnn())
    gradients = [torch.zeros_like(p) for p in parameters]
    for deltas in several_steps(RULES["nominal"], spec, parameters, [gradients] * 2):
        assert not any(delta.any() for delta in deltas)


def test_a_parameter_that_never_had_a_gradient_does_not_move():
    spec, parameters = prepared(small_cnn())
    history = [random_like(parameters, seed) for seed in range(3)]
    dead = [torch.zeros_like(p, dtype=torch.bool) for p in parameters]
    dead[0][1] = True  # a row,
    dead[0][:, 1] = True  # a column,
    dead[3][2, 0] = True  # a single weight of a neuron that learns,
    dead[6][0] = True  # and a bias
    for gradients in history:
        for g, mask in zip(gradients, dead, strict=True):
            g[mask] = 0
    for deltas in several_steps(RULES["nominal"], spec, parameters, history):
        for delta, mask in zip(deltas, dead, strict=True):
            assert not delta[mask].any()
            assert delta[~mask].all()


def test_a_parameter_whose_gradient_stopped_goes_on():
    spec, parameters = prepared(small_cnn())
    history = [random_like(parameters, 0), [torch.zeros_like(p) for p in parameters]]
    for delta in several_steps(RULES["nominal"], spec, parameters, history)[-1]:
        assert delta.all()


@pytest.mark.parametrize("preset", RULES)
def test_gradients_reach_every_weight_of_the_rule_and_nothing_else(preset):
    spec, parameters = prepared(small_cnn())
    parameters = [p.requires_grad_() for p in parameters]
    gradients = [g.requires_grad_() for g in random_like(parameters, 0)]
    state = [State.fresh(p) for p in parameters]
    for s in state:
        s.momenta.requires_grad_()
    deltas, after = update(RULES[preset], spec, parameters, gradients, state)
    targets = random_like(deltas, 1)
    loss = sum((d * t).sum() for d, t in zip(deltas, targets, strict=True))
    reached = torch.autograd.grad(loss, list(RULES[preset].parameters()), allow_unused=True)
    for (name, _), g in zip(RULES[preset].named_parameters(), reached, strict=True):
        assert g is not None and g.isfinite().all() and g.any(), name
    outside = [*parameters, *gradients, *[s.momenta for s in state]]
    unused = torch.autograd.grad(loss, outside, allow_unused=True)
    assert all(g is None for g in unused)
    assert not any(s.momenta.requires_grad for s in after)


def test_gradient_in_a_weight_of_the_rule_is_the_slope():
    spec, parameters = prepared(small_cnn())
    gradients, state = random_like(parameters, 0), [State.fresh(p) for p in parameters]
    rule = RULES["nominal"]

    def loss() -> torch.Tensor:
        deltas, _ = update(rule, spec, parameters, gradients, state)
        return sum((d * t).sum() for d, t in zip(deltas, random_like(deltas, 1), strict=True))

    for weight in (rule.head.last.bias, rule.reader.backbone.layers[0].film.weight):
        (slope,) = torch.autograd.grad(loss(), weight)
        entry, small = weight.data.view(-1)[:1], 1e-6
        with torch.no_grad():
            entry += small
            above = loss()
            entry -= 2 * small
            below = loss()
            entry += small
        torch.testing.assert_close(
            (above - below) / (2 * small), slope.view(-1)[0], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e4, 1e8])
def test_updates_stay_finite_and_bounded_whatever_the_gradients(scale):
    spec, parameters = prepared(small_cnn())
    parameters = [p.float() for p in parameters]
    history = [[scale * g.float() for g in random_like(parameters, s)] for s in range(3)]
    rule = random_rule(SMALL).float()
    for deltas in several_steps(rule, spec, parameters, history):
        for delta in deltas:
            step = KERNEL_STEP / delta[0].numel() ** 0.5 if delta.dim() > 1 else VECTOR_STEP
            # The largest entry of a matrix with singular values below 1.3, or of RMS 1.
            most = 1.3 * max(delta[0].numel(), len(delta)) ** 0.5
            bound = step * math.e * (most + DIRECTION_GAIN)
            assert delta.isfinite().all()
            assert delta.abs().max() < bound


def test_a_float32_rule_agrees_with_a_float64_rule():
    spec, parameters = prepared(small_cnn())
    gradients, state = random_like(parameters, 0), [State.fresh(p) for p in parameters]
    expected, _ = update(RULES["nominal"], spec, parameters, gradients, state)
    found, _ = update(random_rule(SMALL).float(), spec, parameters, gradients, state)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        # A Gram matrix squares the condition of its kernel: the weakest of a square kernel's
        # directions keeps one or two digits.
        assert (a - b).abs().max() < 0.1 * b.abs().max()


@pytest.mark.parametrize("preset", RULES)
def test_a_weight_of_zero_is_still_an_edge(preset):
    """Zeroing a weight changes its features, not who talks to whom: the answer is continuous."""
    spec, parameters = prepared(small_cnn())
    gradients, state = random_like(parameters, 0), [State.fresh(p) for p in parameters]
    answers = []
    for weight in (0.0, 1e-12):
        parameters[3][0, 0] = weight
        answers.append(update(RULES[preset], spec, parameters, gradients, state)[0])
    for zero, tiny in zip(*answers, strict=True):
        torch.testing.assert_close(zero, tiny, rtol=1e-5, atol=1e-7)
