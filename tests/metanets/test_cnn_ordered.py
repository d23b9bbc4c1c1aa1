"""The ordered pass over CNNs of any architectures, against one neuron after the other."""

import math

import pytest
import torch
from support.slow_ng_t import noisy
from torch import nn

from l2o_graph.cnn import GeneralizationPredictor, cnn_config
from l2o_graph.datasets.cnn.architecture import CNNArchitecture, cnn_module
from l2o_graph.datasets.cnn.files import CNNs
from l2o_graph.layout.tables import KNOWN_ACTIVATIONS
from l2o_graph.models.ordered import levels

# A skip adds channel c of an earlier layer to channel c: an edge of weight 1 in the centre.
A = CNNArchitecture((2, 3, 4), (3, 5), ("relu", "tanh"), (-1, 0), (1, 1), 3)
B = CNNArchitecture((2, 4, 3, 4), (1, 3, 3), ("", "gelu", "relu"), (-1, -1, 1), (1,) * 3, 3)
ROOM = {"inputs": 2, "depth": 4, "classes": 3, "max_kernel": 5, "dropout": 0.0, "hidden": 6}


def networks(*architectures):
    torch.manual_seed(0)
    modules = [cnn_module(a).double() for a in architectures]
    count = len(modules)
    values = tuple(torch.cat([p.detach().flatten() for p in m.parameters()]) for m in modules)
    kinds = tuple(dict.fromkeys(architectures))
    return modules, CNNs(
        architectures=kinds,
        which=torch.tensor([kinds.index(a) for a in architectures]),
        values=values,
        accuracy=torch.full((count,), 0.5),
        run=torch.arange(count),
        step=torch.ones(count, dtype=torch.int64),
    )


def made(**changes):
    torch.manual_seed(1)
    model = GeneralizationPredictor(cnn_config("ordered", **{**ROOM, **changes}))
    return noisy(model).eval()


def padded(kernel, side=5):
    """A kernel in the centre of a square of zeros, in a row."""
    margin = (side - kernel.shape[-1]) // 2
    return nn.functional.pad(kernel, (margin,) * 4).flatten()


def slow(model, module):
    """The logit of one network, neuron by neuron."""
    body, a = model.body, module.architecture
    nodes, backbone = body.nodes, body.backbone

    def edge(kernel):
        return body.edges.kernel(padded(kernel)[None])[0]

    def own(bias, position, activation):
        state = nodes.bias(torch.full((1, 1), float(bias), dtype=torch.float64))[0]
        state = state + nodes.table[position]
        if activation is not None:
            state = state + nodes.activation.weight[KNOWN_ACTIVATIONS.index(activation)]
        return state

    def stepped(terms, itself):
        message = sum(terms) / math.sqrt(len(terms))
        return backbone.norm(backbone.cell(message, itself))

    one = torch.ones(1, 1, dtype=torch.float64)
    layers = [[own(0.0, c, None) for c in range(a.channels[0])]]
    for i, convolution in enumerate(module.convolutions):
        states = []
        for o in range(a.channels[i + 1]):
            weight = convolution.weight
            terms = [edge(weight[o, c]) * backbone.say(s) for c, s in enumerate(layers[i])]
            if a.skips[i] >= 0 and o < len(layers[a.skips[i]]):
                terms.append(edge(one) * backbone.say(layers[a.skips[i]][o]))
            itself = own(convolution.bias[o], ROOM["inputs"] + i, a.activations[i])
            states.append(stepped(terms, itself))
        layers.append(states)
    outputs = []
    first = ROOM["inputs"] + ROOM["depth"]
    for o in range(a.classes):
        weight = module.linear.weight[o]
        terms = [edge(weight[c].view(1, 1)) * backbone.say(s) for c, s in enumerate(layers[-1])]
        outputs.append(stepped(terms, own(module.linear.bias[o], first + o, None)))
    return body.head(torch.stack(outputs))[0]


def test_a_mixed_batch_is_one_neuron_after_the_other():
    model = made()
    modules, cnns = networks(A, B, A)
    found = model.logits(cnns)
    with torch.no_grad():
        for module, logit in zip(modules, found, strict=True):
            torch.testing.assert_close(slow(model, module), logit, rtol=1e-9, atol=1e-9)
    assert found.max() - found.min() > 1e-4


def test_the_order_of_levels_is_the_longest_way_from_an_input():
    #  0 -> 1 -> 2 -> 4, 0 -> 3 -> 4, 0 -> 4; 5 is alone
    source, target = torch.tensor([[0, 1, 2, 0, 3, 0], [1, 2, 4, 3, 4, 4]])
    assert levels(6, source, target).tolist() == [0, 1, 2, 1, 3, 0]
    with pytest.raises(ValueError, match="expected a network without cycles"):
        levels(3, torch.tensor([0, 1, 2]), torch.tensor([1, 2, 1]))
