"""Graph models that read what CNNs answer to learned images, and what their neurons respond."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2o_graph.cnn import (
    CNNArchitecture,
    CNNs,
    GeneralizationPredictor,
    cnn_config,
    cnn_module,
    predict_accuracy,
    save_cnn_model,
)
from l2o_graph.datasets.cnn.files import chosen

PLAIN = CNNArchitecture((3, 4, 8), (3, 5), ("relu", "tanh"), (-1, -1), (2, 1))
SKIPS = CNNArchitecture(
    (3, 6, 4, 8), (3, 3, 5), ("gelu", "leaky_relu", "sigmoid"), (-1, -1, 1), (2, 1, 1)
)
SIDE, PROBES = 8, 5


def made(model="ng_gnn", **changes):
    torch.manual_seed(1)
    sizes = {"probes": PROBES, "side": SIDE, "hidden": 6, "layers": 3, "dropout": 0.0, **changes}
    return GeneralizationPredictor(cnn_config(model, heads=2, **sizes)).double().eval()


def networks(*architectures):
    """A module of each, and the same as a set."""
    torch.manual_seed(0)
    modules = [cnn_module(a).double() for a in architectures]
    distinct = tuple(dict.fromkeys(architectures))
    index = torch.arange(len(modules))
    return modules, CNNs(
        architectures=distinct,
        which=torch.tensor([distinct.index(a) for a in architectures]),
        values=tuple(torch.cat([p.detach().flatten() for p in m.parameters()]) for m in modules),
        accuracy=torch.full((len(modules),), 0.5),
        run=index,
        step=index,
    )


def slow_responses(module, images):
    """Of each neuron the mean and the root mean square over each image: one image at a time."""
    a = module.architecture
    columns = []
    for image in images:
        layers, numbers = [image[None]], []
        for i, convolution in enumerate(module.convolutions):
            x = convolution(layers[-1])
            if a.skips[i] >= 0:
                added = layers[a.skips[i]]
                most = min(added.shape[1], x.shape[1])
                x[:, :most] = x[:, :most] + added[:, :most]
            x = getattr(F, a.activations[i])(x)
            layers.append(x)
            numbers += [(c.mean(), (c**2).mean() ** 0.5) for c in x[0]]
        columns.append(numbers)
    count = len(columns[0])
    return torch.tensor(
        [[column[i][kind] for kind in (0, 1) for column in columns] for i in range(count)]
    )


def test_responses_are_those_of_each_neuron_to_each_image():
    answers = made(responses=True).body.answers
    modules, cnns = networks(PLAIN, SKIPS, PLAIN)
    with torch.no_grad():
        _, found = answers(cnns, hidden=True)
        shares, none = answers(cnns)
        images = answers.images()
        start = 0
        for i, module in enumerate(modules):
            count = sum(module.architecture.channels) + 10
            own = found[start : start + count]
            start += count
            assert not own[:3].any() and not own[-10:].any(), "inputs and outputs respond nothing"
            expected = slow_responses(module, images)
            torch.testing.assert_close(own[3:-10], expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(shares[i].view(PROBES, 10), module(images).softmax(1))
    assert none is None and start == len(found)


@pytest.mark.parametrize("model", ["ng_gnn", "ng_t", "ordered"])
@pytest.mark.parametrize("responses", [False, True])
def test_a_prediction_is_of_a_network_alone_and_of_its_neurons_in_any_order(model, responses):
    predictor = made(model, responses=responses)
    modules, cnns = networks(PLAIN, SKIPS, PLAIN)
    with torch.no_grad():
        found = predictor(cnns)
        for i in range(len(cnns)):
            alone = predictor(chosen(cnns, torch.tensor([i])))
            torch.testing.assert_close(alone, found[[i]], rtol=0, atol=1e-9)
        first, second = modules[0].convolutions
        order = torch.tensor([2, 0, 3, 1])
        first.weight[:], first.bias[:] = first.weight[order], first.bias[order]
        second.weight[:] = second.weight[:, order]
        moved = with_first(cnns, modules[0])
        assert not torch.equal(moved.values[0], cnns.values[0])
        torch.testing.assert_close(predictor(moved), found, rtol=0, atol=1e-9)
        second.weight[0, 0] += 0.3
        assert (predictor(with_first(cnns, modules[0])) - found)[0].abs() > 1e-8


def with_first(cnns, module):
    """The set, its first network now another."""
    row = torch.cat([p.detach().flatten() for p in module.parameters()])
    return replace(cnns, values=(row, *cnns.values[1:]))


@pytest.mark.parametrize("responses", [False, True])
def test_gradients_reach_images_and_what_reads_them(responses):
    predictor = made(responses=responses)
    predictor.logits(networks(PLAIN, SKIPS)[1]).sum().backward()
    parts = [predictor.body.answers, predictor.body.reader]
    parts += [predictor.body.responses] if responses else []
    for part in parts:
        for p in part.parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0


@pytest.fixture(params=["probegen", "ng_gnn"])
def path(request, tmp_path):
    save_cnn_model(tmp_path / "model.safetensors", made(request.param), {})
    return tmp_path / "model.safetensors"


def test_a_module_answers_as_its_network_in_a_set(path):
    modules, cnns = networks(PLAIN, SKIPS)
    model = GeneralizationPredictor.from_checkpoint(path)
    for module, expected in zip(modules, model(cnns).tolist(), strict=True):
        module.train()
        found = predict_accuracy(module.float(), torch.zeros(2, 3, 16, 16), path)
        assert found == pytest.approx(expected, abs=1e-5)
        assert module.training


def test_networks_that_do_not_answer_are_refused_and_stay_as_they_were(path):
    batch = torch.zeros(2, 3, 16, 16)
    expected = "network: expected one that maps images of 3 x 8 x 8 to 10 logits, found one that "
    body = [nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), nn.Flatten()]
    fixed = nn.Sequential(*body, nn.Linear(4 * 4, 10)).train()
    with pytest.raises(ValueError, match=expected + "fails on them: mat1 and mat2"):
        predict_accuracy(fixed, batch, path)
    assert fixed.training
    pool = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    few = nn.Sequential(*pool, nn.Linear(4, 7))
    with pytest.raises(ValueError, match=expected + r"maps 5 of them to \[5, 7\]"):
        predict_accuracy(few, batch, path)


def test_hidden_neurons_of_a_module_are_not_asked(tmp_path):
    save_cnn_model(tmp_path / "model.safetensors", made(responses=True), {})
    with pytest.raises(ValueError, match="responses: expected networks of a CNNArchitecture"):
        predict_accuracy(cnn_module(PLAIN), torch.zeros(1, 3, 8, 8), tmp_path / "model.safetensors")
