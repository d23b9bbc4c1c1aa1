"""Tasks by name, their variants, and the command that goes through them."""

import json

import pytest
import torch

from meta_train.benchmarks import transfer
from meta_train.benchmarks.baselines import BEST_RATES, contenders
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
        ("fmnist_sample:norm=1", 14_378 + 2 * (16 + 32 + 32)),
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


def test_a_norm_is_judged_by_its_running_statistics_and_trained_by_its_batch():
    net = problem("fmnist_sample:norm=1")
    parameters = list(net.module.parameters())
    norm = net.module[1]
    before = norm.running_mean.clone()
    net.loss(parameters, net.batch(0))
    trained = norm.running_mean.clone()
    assert not torch.equal(before, trained)
    net.accuracy(parameters)
    assert torch.equal(norm.running_mean, trained)
    assert norm.training


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", r"unknown task 'nothing', expected one of \['cifar10_cnn', "),
        ("fmnist_cnn:size=3", r"expected one of \['batch', 'width', 'depth', 'norm'\], found 's"),
        ("fmnist_mlp:depth=3", r"expected one of \['batch', 'width'\], found 'depth'"),
        ("fmnist_cnn:width", "expected e.g. width=64, found 'width'"),
        ("fmnist_cnn:width=big", "expected e.g. width=64, found 'width=big'"),
        ("fmnist_cnn:depth=0", "depth: expected at least 1, found 0"),
    ],
)
def test_what_is_no_task(name, message):
    with pytest.raises(ValueError, match=message):
        get_task(name)


@pytest.fixture
def short(monkeypatch):
    """Two places of few steps on the packaged sample, enough to do better than guessing."""
    small = "fmnist_sample:width=4"
    places = (("nothing", small, 150), ("smaller batches", f"{small},batch=64", 160))
    monkeypatch.setattr(transfer, "PLACES", places)


def test_transfer_trains_everything_once_and_tabulates_it(short, tmp_path, capsys):
    arguments = ["--optimizers", "adam", "sgd", "--rate", "sgd=0.1", "adam=1e6"]
    arguments += ["--out", str(tmp_path)]
    assert transfer.main(arguments) == 0
    rows = (tmp_path / "transfer.md").read_text().splitlines()
    assert rows[0] == "| different | Adam (1e+06) | SGD Nesterov, linear decay (0.1) |"
    assert [row.split(" |")[0] for row in rows[2:]] == [
        "| nothing", "| smaller batches", "| failed",
    ]  # fmt: skip
    assert rows[2].split(" | ")[1] == "failed"
    assert rows[4].split(" | ")[1:] == ["2", "0 |"]
    records = json.loads((tmp_path / "results.json").read_text())
    assert sorted(r["run"]["steps"] for r in records) == [150, 150, 160, 160]
    capsys.readouterr()
    assert transfer.main(arguments) == 0  # all there already
    assert "seed" not in capsys.readouterr().err


def test_a_run_that_collapses_to_a_constant_has_failed(short, tmp_path):
    assert transfer.main(["--optimizers", "sgd", "--rate", "sgd=0", "--out", str(tmp_path)]) == 0
    assert "| failed | 2 |" in (tmp_path / "transfer.md").read_text()


def test_transfer_knows_a_rate_for_every_optimizer_and_refuses_others(short, tmp_path, capsys):
    assert set(BEST_RATES) == set(contenders())
    assert transfer.main(["--optimizers", "lion", "--rate", "lion=1", "--out", str(tmp_path)]) == 2
    assert "unknown optimizer 'lion'" in capsys.readouterr().err
