"""What the baselines read: the LSTM beside a slow twin, FF nothing at all."""

import pytest
import torch
from conftest import paper_cnn, random_like, random_rule
from torch import Tensor, nn

from l2o_graph.graph import topology_of
from l2o_graph.inference import spec_of_module
from l2o_graph.models.embedding import Part
from l2o_graph.observation import SQUASHED_TO_UNIT, observe, scalars_of
from l2o_graph.rule import (
    HALVED_AFTER,
    KERNEL_STEP,
    PAPER,
    VECTOR_STEP,
    RuleConfig,
    UpdateRule,
    untrained,
)
from l2o_graph.step import State, update, updates

LSTM = RuleConfig(hidden=5, inner=4, model="lstm", direction="squashed")
FF = RuleConfig(hidden=5, inner=4, model="ff", direction="squashed")


def network() -> nn.Module:
    """With kernel positions, a set of biases and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2)
    ).double()


def deltas(rule: UpdateRule, gradients: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    state = [State.fresh(p) for p in weights]
    return update(rule, spec_of_module(network()), weights, gradients, state)[0]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_paper_presets_have_the_published_sizes():
    assert count(UpdateRule(PAPER["ff"])) == 5_250
    assert count(UpdateRule(PAPER["lstm"])) == 11_554
    class_token = 32  # published, but left out: it shifted every position by one
    assert count(UpdateRule(PAPER["ng_t"])) == 398_466 - class_token


@pytest.mark.parametrize("model", PAPER)
def test_paper_presets_train_the_published_optimizee(model):
    cnn = paper_cnn(1, 16)
    weights = [p.detach() for p in cnn.parameters()]
    state = [State.fresh(p) for p in weights]
    rule = UpdateRule(PAPER[model])
    found, _ = update(rule, spec_of_module(cnn), weights, random_like(weights, 0), state)
    assert sum(w.numel() for w in weights) == 14_378
    for delta, w in zip(found, weights, strict=True):
        assert delta.shape == w.shape
        assert delta.isfinite().all() and delta.any()


def slow_states(rule: UpdateRule, features: list[Tensor]) -> list[Tensor]:
    """The LSTM's state of each tensor from (F, n) features, gate by gate (Hochreiter 1997)."""
    read, cell = rule.reader.read, rule.reader.cell
    hidden = memory = torch.zeros(rule.config.hidden, dtype=torch.float64)
    states = []
    for x in features:
        mapped = [read[2](torch.relu(read[0](column))) for column in x.T]
        mean = sum(mapped) / len(mapped)
        gates = cell.weight_ih @ mean + cell.bias_ih + cell.weight_hh @ hidden + cell.bias_hh
        into, forget, fresh, out = gates.chunk(4)
        memory = torch.sigmoid(forget) * memory + torch.sigmoid(into) * torch.tanh(fresh)
        hidden = torch.sigmoid(out) * torch.tanh(memory)
        states.append(hidden)
    return states


def test_lstm_equals_the_slow_twin():
    rule = random_rule(LSTM)
    weights = [p.detach() for p in network().parameters()]
    gradients = random_like(weights, 0)
    spec = spec_of_module(network())
    momenta = [g.expand(5, *g.shape) for g in gradients]
    ages = [torch.zeros(())] * len(weights)
    seen = observe(spec, weights, gradients, momenta, ages, torch.float64, orthogonal=False)
    parts = [Part(i, 0, w.numel(), (), seen[i].shared) for i, w in enumerate(weights)]
    expected = slow_states(rule, [scalars_of(seen, [part]).x for part in parts])

    found: dict[int, list[Tensor]] = {}
    read = rule.reader.forward

    def spy(topology, groups, features):
        states = read(topology, groups, features)
        for group in groups:
            for part, run in zip(group.parts, states(group).split(group.cells()), strict=True):
                found.setdefault(part.parameter, []).append(run)
        return states

    rule.reader.forward = spy
    list(rule(topology_of(spec), seen, chunk_size=7))
    for i, state in enumerate(expected):
        for row in torch.cat(found[i]):
            torch.testing.assert_close(row, state)
    assert len(found) == len(weights)


@pytest.mark.parametrize("config", [LSTM, FF], ids=["lstm", "ff"])
def test_chunks_change_nothing(config):
    rule, spec = random_rule(config), spec_of_module(network())
    weights = [p.detach() for p in network().parameters()]
    gradients = random_like(weights, 0)
    state = [State(g.expand(5, *g.shape), torch.zeros(())) for g in gradients]
    whole, pieces = ([torch.zeros_like(w).flatten() for w in weights] for _ in range(2))
    for answer, size in ((whole, 10_000), (pieces, 7)):
        for part, run in updates(rule, spec, weights, gradients, state, size):
            answer[part.parameter][part.start : part.stop] = run
    for a, b in zip(whole, pieces, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", [LSTM, FF], ids=["lstm", "ff"])
def test_what_a_tensor_is_told_of_the_others(config):
    """FF nothing; the LSTM what came before it, and nothing of what comes after."""
    rule, changed = random_rule(config), 4
    weights = [p.detach() for p in network().parameters()]
    gradients = random_like(weights, 0)
    other = list(gradients)
    other[changed] = 3 * other[changed].flip(0)
    before, after = deltas(rule, gradients, weights), deltas(rule, other, weights)
    # What is noise in a tensor is told by all: that may change the last digits.
    pairs = zip(before, after, strict=True)
    same = [torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs]
    assert all(same[:changed])
    assert not same[changed]
    assert same[changed + 1 :] == [config.model == "ff"] * (len(same) - changed - 1)


def test_the_squashed_direction_takes_each_parameter_by_itself():
    rule = untrained(FF, 0).double()
    weights = [p.detach() for p in network().parameters()]
    state, spec = [State.fresh(p) for p in weights], spec_of_module(network())
    kernels = {k.parameter for k in spec.kernels if k.kind != "norm"}
    history = [random_like(weights, seed) for seed in range(3)]
    for gradients in history:
        found, state = update(rule, spec, weights, gradients, state)
    for i, delta in enumerate(found):
        momentum = torch.zeros_like(delta)
        for gradients in history:
            momentum = 0.9 * momentum + gradients[i]
        follow = history[-1][i] + 0.9 * momentum
        relative = follow / follow.square().mean().sqrt()
        if i in kernels:
            size = KERNEL_STEP / delta[0].numel() ** 0.5
            expected = -size * 1.7 * relative / (relative**2 + 1).sqrt()
        else:
            expected = -VECTOR_STEP * relative
        expected /= 1 + (len(history) - 1) / HALVED_AFTER
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-9)


def test_squashed_normal_values_have_an_rms_of_one():
    x = torch.randn(100_000, dtype=torch.float64)
    assert abs(SQUASHED_TO_UNIT * (x / (x**2 + 1).sqrt()).square().mean().sqrt() - 1) < 0.01
