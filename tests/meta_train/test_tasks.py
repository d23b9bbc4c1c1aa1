"""Tasks by name, and their variants."""

import pytest
import torch

from meta_train.tasks import get_task

CPU = torch.device("cpu")


def problem(name: str):
    task = get_task(name)
    task.load(None)
    return task.problem(0, CPU)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("fmnist_sample", 14_378),
        ("fmnist_sample:width=32", 56_394),
        ("fmnist_sample:depth=2", 160 + 4_640 + 330),
        ("fmnist_sample:depth=5", 14_378 + 2 * 9_248),
    ],
)
def test_a_variant_is_another_network_on_the_same_images(name, parameters):
    net, home = problem(name), problem("fmnist_sample")
    assert sum(p.numel() for p in net.module.parameters()) == parameters
    assert torch.equal(net.batch(3)[0], home.batch(3)[0])


def test_a_variant_may_have_other_batches():
    net = problem("fmnist_sample:batch=32,width=8")
    assert net.batch(0)[0].shape == (32, 1, 28, 28)
    assert net.module[0].out_channels == 8


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", r"unknown task 'nothing', expected one of \['cifar10_cnn', "),
        ("fmnist_cnn:size=3", r"expected one of \['batch', 'width', 'depth'\], found 'size'"),
        ("fmnist_mlp:depth=3", r"expected one of \['batch', 'width'\], found 'depth'"),
        ("fmnist_cnn:width", "expected e.g. width=64, found 'width'"),
        ("fmnist_cnn:width=big", "expected e.g. width=64, found 'width=big'"),
        ("fmnist_cnn:depth=0", "depth: expected at least 1, found 0"),
    ],
)
def test_what_is_no_task(name, message):
    with pytest.raises(ValueError, match=message):
        get_task(name)
