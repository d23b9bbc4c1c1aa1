"""The timing script measures what it says, against the passes of the same network."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from support.optimizers import controller_file
from torch import nn

from meta_train.benchmarks.contenders import LIBRARY
from meta_train.benchmarks.step_cost import NETS, NG, OPTIMIZERS, FlatMuon, main, step_costs

HAS_MUON = hasattr(torch.optim, "Muon")


def test_measures_all_optimizers(monkeypatch, tmp_path):
    monkeypatch.setitem(NETS, "small", replace(NETS["small"], repeats=1))
    costs = step_costs(nets=["small"], checkpoint=str(controller_file(tmp_path)))
    lacking = {"SOAP": find_spec(LIBRARY) is None, "Muon": not HAS_MUON}
    names = [name for name in OPTIMIZERS if not lacking.get(name)]
    assert [cost.optimizer for cost in costs] == names
    for cost in costs:
        assert 0 < cost.seconds <= cost.slowest
        assert cost.passes == pytest.approx(cost.seconds / cost.pass_seconds)
        assert cost.slowest_passes >= cost.passes
    assert len({cost.pass_seconds for cost in costs}) == 1


def test_the_command_prints_the_bar(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(NETS, "small", replace(NETS["small"], repeats=1))
    checkpoint = ["--checkpoint", str(controller_file(tmp_path))]
    given = ["--nets", "small", "--optimizers", NG, "--rounds", "1", "--threads", "1"]
    assert main([*given, *checkpoint]) == 0
    printed = capsys.readouterr().out
    assert f"| {NETS['small'].label} |" in printed
    assert printed.count("≤ 4") == 1
    assert "CPU threads: 1" in printed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--rounds", "0"], "rounds: expected at least 1, found 0"),
        (["--threads", "0"], "threads: expected from 1 to 4096, found 0"),
        (["--device", "nonsense"], "device: cannot use 'nonsense'"),
        (["--checkpoint", "nonsense"], "unknown checkpoint 'nonsense'"),
    ],
)
def test_what_cannot_be_measured_gets_one_line(options, expected, capsys):
    assert main(["--nets", "small", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step_cost: ") and expected in line


def test_the_networks_are_those_that_the_bars_are_for():
    sizes = {
        name: sum(p.numel() for p in NETS[name].make().parameters()) / 1e6
        for name in ("gpt", "mlp", "small")
    }
    assert sizes == pytest.approx({"gpt": 5.3, "mlp": 1.86, "small": 0.0175}, rel=0.02)
    assert {name: net.bar for name, net in NETS.items()} == {
        "gpt": 0.6, "resnet18": 3.0, "mlp": 6.0, "cifar10": 0.12, "fmnist": None, "small": 4.0,
    }  # fmt: skip


@pytest.mark.skipif(not HAS_MUON, reason="torch has Muon from 2.9 on")
def test_muon_sees_kernels_as_matrices():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    net(torch.randn(3, 2, 3, 3)).square().sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    FlatMuon(net).step()
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_unknown_names_and_no_rounds_are_refused():
    with pytest.raises(ValueError, match=r"unknown 'vgg'.*resnet18"):
        step_costs(nets=("vgg",))
    with pytest.raises(ValueError, match="rounds"):
        step_costs(nets=("small",), rounds=0)
