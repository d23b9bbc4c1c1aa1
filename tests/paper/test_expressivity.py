"""NG-GNN, set by hand, against the MLPs that it reads; each part of it is needed."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from l2o_graph.inr import stack_networks
from l2o_graph.paper.expressivity import (
    IDENTITY,
    RELU,
    SILU,
    ForwardPass,
    interpolated,
    leaky_relu,
)

CLOSE = 1e-6
EXACT = {
    "identity": (nn.Identity(), IDENTITY),
    "silu": (nn.SiLU(), SILU),
    "relu": (nn.ReLU(), RELU),
    "leaky_relu": (nn.LeakyReLU(), leaky_relu()),
    "leaky_relu, 0.3": (nn.LeakyReLU(0.3), leaky_relu(0.3)),
}
LAYOUTS = st.lists(st.integers(1, 32), min_size=2, max_size=7)


def mlp(layout, activation):
    """Of weights and biases that keep what neurons say near 1."""
    layers = []
    for read, written in pairwise(layout):
        layer = nn.Linear(read, written)
        nn.init.normal_(layer.weight, std=read**-0.5)
        nn.init.normal_(layer.bias)
        layers += [layer, activation]
    return nn.Sequential(*layers[:-1]).double()


def difference(model, networks, x, read=None):
    """The largest, between what networks say and what is read of them, or of others."""
    with torch.no_grad():
        itself = torch.stack([network(own) for network, own in zip(networks, x, strict=True)])
        return (model(*stack_networks(read or networks), x) - itself).abs().max().item()


@settings(max_examples=40)
@given(st.sampled_from(sorted(EXACT)), LAYOUTS, st.integers(0, 2**20))
def test_it_computes_what_any_mlp_computes(name, layout, seed):
    torch.manual_seed(seed)
    activation, as_silus = EXACT[name]
    networks = [mlp(layout, activation) for _ in range(2)]
    x = torch.randn(2, 3, layout[0], dtype=torch.float64)
    assert difference(ForwardPass(layout, as_silus), networks, x) <= CLOSE


@pytest.fixture
def three_layers():
    """A model, a network that it is for, inputs."""
    layout = [3, 8, 6, 2]
    network = mlp(layout, nn.SiLU())
    return ForwardPass(layout, SILU), [network], torch.randn(1, 5, 3, dtype=torch.float64)


def test_another_activation_is_not_computed(three_layers):
    model, [network], x = three_layers
    tanh = nn.Sequential(*(nn.Tanh() if isinstance(m, nn.SiLU) else m for m in network))
    assert difference(model, [tanh], x) > 1e-2


def test_one_weight_or_bias_that_is_another_is_seen(three_layers):
    model, networks, x = three_layers
    for i in range(len(list(networks[0].parameters()))):
        other = mlp([3, 8, 6, 2], nn.SiLU())
        other.load_state_dict(networks[0].state_dict())
        with torch.no_grad():
            list(other.parameters())[i].view(-1)[0] += 0.1
        assert difference(model, networks, x, read=[other]) > 1e-4


def test_it_takes_as_many_rounds_as_there_are_layers(three_layers):
    model, networks, x = three_layers
    assert len(model.backbone.layers) == 3
    # With one round fewer, the last layer gathers what the second has not computed yet.
    for modules in (model.backbone.layers, model.backbone.norms):
        del modules[-1]
    assert difference(model, networks, x) > 1e-2


def test_all_that_is_set_is_needed(three_layers):
    model, networks, x = three_layers
    found = [(name, p) for name, p in model.named_parameters() if p.any()]
    assert len(found) > 15
    for name, p in found:
        before = p.clone()
        p.zero_()
        assert difference(model, networks, x) > 1e-2, name
        p.copy_(before)
    assert difference(model, networks, x) <= CLOSE


class Unchanged(nn.Module):
    """In the place of a norm."""

    def forward(self, x, route):
        return x


def test_the_norm_leaves_things_as_they_are_and_would_not_without_loud_channels(three_layers):
    model, networks, x = three_layers
    norms = model.backbone.norms
    model.backbone.norms = nn.ModuleList(Unchanged() for _ in norms)
    assert difference(model, networks, x) <= CLOSE
    for layer in model.backbone.layers:
        layer.node.bias.zero_()
    assert difference(model, networks, x) <= CLOSE
    model.backbone.norms = norms
    assert difference(model, networks, x) > 1e-2


@pytest.mark.parametrize("count", [13, 25, 49])
def test_between_its_knots_an_activation_is_within_the_bound_and_beyond_them_constant(count):
    knots = torch.linspace(-3, 3, count, dtype=torch.float64)
    model = ForwardPass([1, 1, 1], interpolated(torch.sin, knots))
    one = [torch.ones(1, 1, 1, dtype=torch.float64)] * 2
    none = [torch.zeros(1, 1, dtype=torch.float64)] * 2
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)[None, :, None]
    bound = (6 / (count - 1)) ** 2 / 8
    off = (model(one, none, x) - x.sin()).abs().max().item()
    assert 0.8 * bound < off < bound + CLOSE
    beyond = model(one, none, 4 * x[:, [0, -1]])
    torch.testing.assert_close(beyond, x[:, [0, -1]].sin(), rtol=0, atol=CLOSE)
