"""Architectures of small CNNs, and the modules that they stand for."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.rules import random_like
from torch.func import functional_call
from torch.nn import functional as F

from l2o_graph.cnn import CNNArchitecture, cnn_module
from l2o_graph.datasets.cnn.architecture import FUNCTIONS

PLAIN = {
    "channels": (3, 4, 6), "kernels": (3, 5), "activations": ("relu", ""), "skips": (-1, -1),
    "strides": (1, 1),
}  # fmt: skip


@st.composite
def drawn(draw):
    depth = draw(st.integers(1, 4))

    def each(strategy):
        return tuple(draw(strategy) for _ in range(depth))

    return {
        "channels": (draw(st.integers(1, 3)), *each(st.integers(1, 6))),
        "kernels": each(st.sampled_from((1, 3, 5, 7))),
        "activations": each(st.sampled_from(tuple(FUNCTIONS))),
        "skips": tuple(draw(st.integers(-1, i - 1)) for i in range(depth)),
        "strides": (draw(st.integers(1, 2)) if depth == 1 else 1,) * depth,
        "classes": draw(st.integers(1, 5)),
    }


def slow_twin(architecture, parameters, x):
    """Channel by channel, pixel by pixel of the kernels, skips added one channel at a time."""
    a = architecture
    layers = [x]
    for i, side in enumerate(a.kernels):
        weight, bias = parameters[2 * i], parameters[2 * i + 1]
        half = side // 2
        padded = F.pad(layers[-1], (half,) * 4)
        height, width = x.shape[2:]
        out = []
        for o in range(a.channels[i + 1]):
            total = torch.zeros(len(x), height, width, dtype=x.dtype) + bias[o]
            for c in range(a.channels[i]):
                for dy in range(side):
                    for dx in range(side):
                        part = padded[:, c, dy : dy + height, dx : dx + width]
                        total = total + weight[o, c, dy, dx] * part
            if a.skips[i] >= 0 and o < layers[a.skips[i]].shape[1]:
                total = total + layers[a.skips[i]][:, o]
            out.append(total)
        stride = a.strides[i]
        hidden = torch.stack(out, dim=1)[:, :, ::stride, ::stride]
        layers.append(FUNCTIONS[a.activations[i]](hidden))
    return layers[-1].flatten(2).mean(2) @ parameters[-2].T + parameters[-1]


@given(drawn(), st.integers(0, 99))
def test_modules_compute_what_a_slow_twin_does(fields, seed):
    architecture = CNNArchitecture(**fields)
    module = cnn_module(architecture).double()
    parameters = random_like(module.parameters(), seed)
    names = [name for name, _ in module.named_parameters()]
    x = random_like([torch.empty(2, architecture.channels[0], 6, 5)], seed + 1)[0]
    found = functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
    torch.testing.assert_close(found, slow_twin(architecture, parameters, x))


@given(drawn())
def test_shapes_are_those_of_the_module(fields):
    architecture = CNNArchitecture(**fields)
    parameters = list(cnn_module(architecture).parameters())
    assert architecture.shapes == tuple(tuple(p.shape) for p in parameters)
    assert architecture.num_parameters == sum(p.numel() for p in parameters)


@given(drawn())
def test_json_gives_the_same_architecture_back(fields):
    architecture = CNNArchitecture(**fields)
    again = CNNArchitecture.from_json(json.loads(json.dumps(architecture.to_json())))
    assert again == architecture
    assert hash(again) == hash(architecture)


def test_the_small_zoos_network_has_the_published_number_of_parameters():
    small = CNNArchitecture((1, 16, 16, 16), (3,) * 3, ("relu",) * 3, (-1,) * 3, (2,) * 3)
    assert small.num_parameters == 4970
    assert cnn_module(small)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_an_architecture_is_told_in_a_line():
    a = CNNArchitecture((3, 4, 6, 8), (3, 5, 7), ("relu", "", "gelu"), (-1, -1, 1), (1, 1, 1))
    assert str(a) == "3-4-6-8-10, kernels 3 5 7, relu none gelu, skips -1 -1 1"
    assert str(CNNArchitecture((1, 4), (3,), ("tanh",), (-1,), (2,), classes=2)) == (
        "1-4-2, kernels 3, tanh, strides 2"
    )


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"channels": (3,)}, r"channels: expected positive numbers for the image and at least"),
        ({"channels": (3, 0, 6)}, r"found \(3, 0, 6\) and 10 classes"),
        ({"classes": 0}, "and 0 classes"),
        ({"kernels": (3,)}, r"kernels: expected one for each of 2 convolutions, found \(3,\)"),
        ({"kernels": (3, 4)}, "kernel of convolution 1: expected an odd size, found 4"),
        ({"strides": (0, 1)}, "stride of convolution 0: expected at least 1, found 0"),
        ({"activations": ("relu", "selu")}, "activation of convolution 1: expected one of .*selu"),
        ({"skips": (0, -1)}, r"skip to convolution 0: .*, one of \[-1\], found 0"),
        ({"skips": (-1, 1)}, r"skip to convolution 1: .*, one of \[-1, 0\], found 1"),
        ({"skips": (-1, 0), "strides": (2, 1)}, r"stride 1 from layer 0 on, found \(2, 1\)"),
    ],
)
def test_what_makes_no_network_is_refused(changed, expected):
    with pytest.raises(ValueError, match=expected):
        CNNArchitecture(**{**PLAIN, **changed})


def test_json_of_something_else_is_refused():
    content = CNNArchitecture(**PLAIN).to_json()
    del content["strides"]
    with pytest.raises(ValueError, match=r"expected the fields \['channels', .* found \['activ"):
        CNNArchitecture.from_json(content)
