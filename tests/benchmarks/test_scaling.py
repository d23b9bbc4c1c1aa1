"""What a step takes is measured where it is said to be, and the workspace has its bound."""

import math
import sys

import pytest
import torch
from support.optimizers import controller_file

from meta_train.benchmarks.scaling import CASES, gpt2, main, measure_all

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_state_and_memory_are_counted(tmp_path):
    path = str(controller_file(tmp_path))
    (scale,) = measure_all(["CNN, width 64"], path, steps=1, threads=1)
    parameters = [p.shape for p in CASES[scale.name].make().parameters()]
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
def test_prints_a_table(tmp_path, capsys):
    path = str(controller_file(tmp_path))
    assert main(["--networks", "CNN, width 16", "--steps", "1", "--checkpoint", path]) == 0
    assert "| CNN, width 16 | 14,666 |" in capsys.readouterr().out


def test_names_an_unknown_network(capsys):
    assert main(["--networks", "resnet17"]) == 2
    assert (
        "unknown network 'resnet17', expected one of ['CNN, width 1024'" in capsys.readouterr().err
    )


def test_gpt2_has_the_published_number_of_parameters():
    with torch.device("meta"):
        shapes = [p.shape for p in gpt2().parameters()]
    assert sum(map(math.prod, shapes)) == 124_439_808
