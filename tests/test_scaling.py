"""What a step takes is measured where it is said to be, and the workspace has its bound."""

import math
import sys

import pytest
import torch

from l2o_graph.step import CHUNK_SIZE
from meta_train.scaling import CASES, GPT2, main, measure_all

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_state_is_what_five_momenta_take_and_memory_is_counted():
    (scale,) = measure_all(["MLP, width 1024"], steps=1, threads=1)
    assert scale.parameters == sum(p.numel() for p in CASES[scale.name].make().parameters())
    assert scale.kept == pytest.approx(4 * 5 * scale.parameters, rel=1e-3)
    assert scale.given > 4 * 2 * scale.parameters
    # In a chunk every scalar takes some 2 kB; small results that stay must not add to that.
    assert 0 < scale.workspace < 3000 * CHUNK_SIZE
    assert scale.step_seconds > 0


@linux
def test_prints_a_table(capsys):
    assert main(["--networks", "CNN, width 16", "--steps", "1"]) == 0
    assert "| CNN, width 16 | 14,666 |" in capsys.readouterr().out


def test_names_an_unknown_network(capsys):
    assert main(["--networks", "resnet17"]) == 2
    assert (
        "unknown network 'resnet17', expected one of ['CNN, width 1024'" in capsys.readouterr().err
    )


def test_gpt2_has_the_published_number_of_parameters():
    with torch.device("meta"):
        shapes = [p.shape for p in GPT2().parameters()]
    assert sum(map(math.prod, shapes)) == 124_439_808
