"""What a step takes is measured where it is said to be, beside the passes of the same network."""

import math
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from support.optimizers import controller_file
from torch import nn

from meta_train.benchmarks.contenders import LIBRARY
from meta_train.benchmarks.memory import scales
from meta_train.benchmarks.nets import NETS, gpt2
from meta_train.benchmarks.step_cost import NG, OPTIMIZERS, FlatMuon, main, step_costs

HAS_MUON = hasattr(torch.optim, "Muon")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_measures_all_optimizers(monkeypatch, tmp_path):
    monkeypatch.setitem(NETS, "small", replace(NETS["small"], repeats=1))
    costs = step_costs(nets=["small"], checkpoint=str(controller_file(tmp_path)))
    lacking = {"SOAP": find_spec(LIBRARY) is None, "Muon": not HAS_MUON}
    names = [name for name in OPTIMIZERS if not lacking.get(name)]
    assert [cost.optimizer for cost in costs] == names
    for cost in costs:
        assert 0 < cost.seconds <= cost.slowest
        assert cost.pass_seconds > 0
    assert len({cost.pass_seconds for cost in costs}) == 1


def test_the_command_prints_a_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(NETS, "small", replace(NETS["small"], repeats=1))
    checkpoint = ["--checkpoint", str(controller_file(tmp_path))]
    given = ["--nets", "small", "--optimizers", NG, "--rounds", "1", "--threads", "1"]
    assert main([*given, *checkpoint]) == 0
    printed = capsys.readouterr().out
    assert f"| {NETS['small'].label} |" in printed
    assert "CPU threads: 1" in printed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--rounds", "0"], "rounds: expected at least 1, found 0"),
        (["--threads", "0"], "threads: expected from 1 to 4096, found 0"),
        (["--device", "nonsense"], "device: cannot use 'nonsense'"),
        (["--checkpoint", "nonsense"], "unknown checkpoint 'nonsense'"),
        (["--memory", "--rounds", "0"], "rounds: expected at least 1, found 0"),
        (["--memory", "--device", "meta"], "device: expected cpu with --memory, found 'meta'"),
    ],
)
def test_what_cannot_be_measured_gets_one_line(options, expected, capsys):
    assert main(["--nets", "small", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step_cost: ") and expected in line


def test_the_networks_are_as_large_as_they_are_said_to_be():
    sizes = {
        name: sum(p.numel() for p in NETS[name].make().parameters()) / 1e6
        for name in ("gpt", "mlp", "small")
    }
    assert sizes == pytest.approx({"gpt": 5.3, "mlp": 1.86, "small": 0.0175}, rel=0.02)


@pytest.mark.skipif(not HAS_MUON, reason="torch has Muon from 2.9 on")
def test_muon_sees_kernels_as_matrices():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    net(torch.randn(3, 2, 3, 3)).square().sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    FlatMuon(net).step()
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_an_unknown_network_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--nets", "vgg"])
    error = capsys.readouterr().err
    assert "invalid choice: 'vgg'" in error and "resnet18" in error


# --- memory ------------------------------------------------------------------------------------


@linux
def test_state_and_memory_are_counted(tmp_path):
    (scale,) = scales(["cnn-64"], str(controller_file(tmp_path)), rounds=1)
    parameters = [p.shape for p in NETS["cnn-64"].make().parameters()]
    assert scale.parameters == sum(map(math.prod, parameters))
    expected = 0
    for shape in parameters:
        size = math.prod(shape)
        expected += 4 * size  # three momenta and the average of the weights
        if len(shape) == 1:
            expected += size  # the average of squares
            continue
        rows, columns = shape[0], size // shape[0]
        right = columns if columns <= 1024 else shape[1]
        expected += 2 * (rows**2 + right**2)  # what whitens both sides
    assert scale.kept == pytest.approx(4 * expected, rel=1e-2)
    assert scale.given > 4 * 2 * scale.parameters
    assert scale.workspace > 0
    assert scale.step_seconds > 0


@linux
def test_memory_is_a_table_of_its_own(tmp_path, capsys):
    path = str(controller_file(tmp_path))
    assert main(["--memory", "--nets", "cnn-16", "--checkpoint", path]) == 0
    assert "| CNN, width 16 | 14,666 |" in capsys.readouterr().out


def test_gpt2_has_the_published_number_of_parameters():
    with torch.device("meta"):
        shapes = [p.shape for p in gpt2().parameters()]
    assert sum(map(math.prod, shapes)) == 124_439_808
