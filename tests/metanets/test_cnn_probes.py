"""ProbeGen on CNNs: what networks answer, side by side, and what is read of it."""

import pytest
import torch

from l2o_graph.cnn import GeneralizationPredictor, cnn_config, save_cnn_model
from l2o_graph.datasets.cnn.architecture import CNNArchitecture, cnn_module
from l2o_graph.datasets.cnn.files import CNNs
from l2o_graph.metanets.cnn_probes import GeneratedImages, responses_of

PLAIN = CNNArchitecture((3, 4, 8), (3, 5), ("relu", "tanh"), (-1, -1), (2, 1))
SKIPS = CNNArchitecture(
    (3, 8, 4, 16, 8), (3, 5, 7, 3), ("gelu", "", "leaky_relu", "sigmoid"), (-1, 0, 1, 2), (1,) * 4
)


def networks(*architectures, each=3):
    """Networks with first weights of torch, by turns of their architectures."""
    torch.manual_seed(0)
    modules = [cnn_module(a).double() for _ in range(each) for a in architectures]
    count = len(modules)
    return modules, CNNs(
        architectures=tuple(architectures),
        which=torch.arange(count) % len(architectures),
        values=tuple(
            torch.cat([p.detach().flatten() for p in module.parameters()]) for module in modules
        ),
        accuracy=torch.full((count,), 0.5),
        run=torch.arange(count),
        step=torch.ones(count, dtype=torch.int64),
    )


def made(**changes):
    torch.manual_seed(1)
    config = cnn_config("probegen", probes=5, hidden=6, layers=3, side=10, **changes)
    return GeneralizationPredictor(config).double().eval()


@pytest.mark.parametrize("architecture", [PLAIN, SKIPS])
def test_networks_side_by_side_answer_as_each_module(architecture):
    modules, _ = networks(architecture)
    images = torch.randn(4, 3, 10, 10, dtype=torch.float64)
    tensors = [torch.stack(ps) for ps in zip(*(m.parameters() for m in modules), strict=True)]
    _, found = responses_of(architecture, tensors, images)
    for module, answers in zip(modules, found, strict=True):
        torch.testing.assert_close(answers, module(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("logits", [False, True])
def test_the_predictor_is_an_mlp_on_outputs(logits):
    model = made(logits=logits)
    modules, cnns = networks(PLAIN, SKIPS)
    images = model.body.answers.images()
    for module, found in zip(modules, model.logits(cnns), strict=True):
        x = module(images)
        x = ((x - x.mean(1, keepdim=True)) / 3).tanh() if logits else x.softmax(1)
        x = x.flatten()
        for layer in model.body.net:
            x = layer(x)
        torch.testing.assert_close(found, x[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("side", "convolutions"), [(16, 3), (14, 2), (10, 2), (7, 1), (28, 3)])
def test_images_of_any_side_are_generated_and_bounded(side, convolutions):
    images = GeneratedImages(3, side, 2)
    assert images().shape == (2, 3, side, side) and len(images.maps) == convolutions
    assert images().abs().max() <= 2


def test_gradients_reach_the_images():
    model = made()
    model.logits(networks(SKIPS)[1]).sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for p in model.body.answers.images.parameters()
    )


def test_what_cannot_be_read_is_named(tmp_path):
    other = CNNArchitecture((1, 4), (3,), ("relu",), (-1,), (1,))
    with pytest.raises(ValueError, match="expected networks from 3 channels to 10 classes, found"):
        made()(networks(other)[1])
    with pytest.raises(ValueError, match="probes: expected at least 1 for 'probegen'"):
        cnn_config("probegen", probes=0)
    with pytest.raises(ValueError, match="probes: expected at least 1 for responses, found 0"):
        cnn_config("ng_gnn", responses=True)
    with pytest.raises(
        ValueError, match=r"probes: expected model 'probegen' or .*, found 'stat_nn'"
    ):
        cnn_config("stat_nn", probes=4)
    model = made().float()
    save_cnn_model(tmp_path / "model.safetensors", model, {})
    again = GeneralizationPredictor.from_checkpoint(tmp_path / "model.safetensors")
    _, cnns = networks(PLAIN)
    with torch.no_grad():
        torch.testing.assert_close(again(cnns), model(cnns))
