"""What the baselines read: FF nothing at all, the LSTM the tensors before its own."""

import pytest
import torch
from support import reference
from support.rules import random_like, random_rule
from torch import Tensor, nn

from l2o_graph.layout.blocks import topology_of
from l2o_graph.paper.features import raw_numbers
from l2o_graph.paper.rule import RuleConfig, UpdateRule
from l2o_graph.paper.step import State, update
from l2o_graph.tracing.by_order import spec_of_module

LSTM, FF = (RuleConfig(model, hidden=5, layers=1, inner=4) for model in ("lstm", "ff"))


def network() -> nn.Module:
    """With kernel positions, a set of biases and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2)
    ).double()


def deltas(rule: UpdateRule, gradients: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    state = [State.fresh(p) for p in weights]
    return update(rule, spec_of_module(network()), weights, gradients, state)[0]


def test_the_states_of_the_lstm_equal_the_slow_twin():
    rule = random_rule(LSTM)
    weights = [p.detach() for p in network().parameters()]
    gradients = random_like(weights, 0)
    momenta = [g.expand(5, *g.shape) for g in gradients]
    parameters = zip(weights, gradients, momenta, strict=True)
    seen = [raw_numbers(*of, torch.float64) for of in parameters]
    slow = [reference.features(w, [g]).flatten(1) for w, g in zip(weights, gradients, strict=True)]
    expected = reference.lstm_states(rule, slow)

    found: dict[int, list[Tensor]] = {}
    read = rule.reader.forward

    def spy(topology, groups, features):
        states = read(topology, groups, features)
        for group in groups:
            for part, run in zip(group.parts, states(group).split(group.cells()), strict=True):
                found.setdefault(part.parameter, []).append(run)
        return states

    rule.reader.forward = spy
    rule(topology_of(spec_of_module(network())), seen)
    for i, state in enumerate(expected):
        for row in torch.cat(found[i]):
            torch.testing.assert_close(row, state)
    assert len(found) == len(weights)


@pytest.mark.parametrize("config", [LSTM, FF], ids=["lstm", "ff"])
def test_what_a_tensor_is_told_of_the_others(config):
    """FF nothing; the LSTM what came before it, and nothing of what comes after."""
    rule, changed = random_rule(config), 4
    weights = [p.detach() for p in network().parameters()]
    gradients = random_like(weights, 0)
    other = list(gradients)
    other[changed] = 3 * other[changed].flip(0)
    before, after = deltas(rule, gradients, weights), deltas(rule, other, weights)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(same[:changed])
    assert not same[changed]
    assert same[changed + 1 :] == [config.model == "ff"] * (len(same) - changed - 1)
