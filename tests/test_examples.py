"""Every script in examples/ runs; the demo compares three, on whatever data there are.

The frameworks train for a few steps, where they are installed.
"""

import importlib.util
import re
import struct
from pathlib import Path

import pytest
import torch

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

# Scripts that need packages of the extra "frameworks".
FRAMEWORKS = {
    "accelerate_loop": ["accelerate"],
    "hf_trainer": ["transformers", "accelerate"],
    "lightning_module": ["lightning"],
}

# Scripts with tests of their own, which run them just as well without data and network.
BY_HAND = {"classify_inr", "demo", "forward_pass_as_graph", "predict_accuracy"}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(name):
    return load(next(path for path in SCRIPTS if path.stem == name))


demo = script("demo")


@pytest.fixture(autouse=True)
def _bare_machine(tmp_path, monkeypatch):
    """An empty folder to be in, no datasets, no network."""

    def no_network(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("L2O_GRAPH_DATA", raising=False)
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)


def write_fashion_mnist(folder):
    """A dataset of noise in the files of FashionMNIST: 256 training and 100 test images."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 256), ("t10k", 100)):
        pixels = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8).numpy().tobytes()
        labels = torch.randint(0, 10, (n,), dtype=torch.uint8).numpy().tobytes()
        images = struct.pack(">iiii", 2051, n, 28, 28) + pixels
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, n) + labels)


@pytest.mark.parametrize("name", sorted({path.stem for path in SCRIPTS} - {*FRAMEWORKS} - BY_HAND))
def test_a_script_runs_without_data_and_network(name):
    script(name).main(steps=2)


def test_networks_are_read_as_the_digits_that_they_draw(capsys):
    assert script("classify_inr").main(steps=300) >= 0.75
    assert "network of a 1: classified as 1" in capsys.readouterr().out


def test_a_graph_network_computes_what_the_networks_compute(capsys):
    off = script("forward_pass_as_graph").main(layouts=1)
    assert 1e-6 < off.pop("tanh, 129 knots") < 1e-2
    assert len(off) == 4 and max(off.values()) <= 1e-6
    assert "ReLU: " in capsys.readouterr().out


def test_a_network_that_learns_is_told_from_one_that_has_not_begun():
    (guess, chance), *_, (expected, accuracy) = script("predict_accuracy").main(steps=40)
    # Of a dataset that the predictor does not know, so that the order alone can be right.
    assert accuracy > chance + 0.1 and expected > guess + 0.02


# What the frameworks say of torch and of a machine without a GPU, or with many cores.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework_trains(name, capsys):
    for package in FRAMEWORKS[name]:
        pytest.importorskip(package, reason="a package of the extra 'frameworks'")
    before, after = script(name).main(steps=40)
    assert after < 0.9 * before
    assert f"test loss {before:.3f} before, {after:.3f} after 40 steps" in capsys.readouterr().out


def test_on_the_sample_the_demo_says_why_and_compares_all_three(tmp_path, capsys):
    path = demo.main(steps=3, out=tmp_path / "plots" / "demo.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    printed, progress = capsys.readouterr()
    assert "data: FashionMNIST, the packaged sample (6,000 of 60,000 images)" in printed
    reason = (
        rf"not in {re.escape(str(tmp_path / 'data'))} and could not be downloaded \(.*no network"
    )
    assert re.search(reason, printed)
    for row in ("Adam, no decay, 0.02", "Muon, 0.05", "NG", "NG, averaged weights"):
        assert f"\n{row} " in printed
    assert "test accuracy" in printed
    for name in ("adam", "muon", "ng"):
        assert f"{name}: " in progress


@pytest.mark.parametrize("by_variable", [False, True])
def test_the_demo_takes_the_whole_dataset_where_there_is_one(
    by_variable, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "datasets"
    write_fashion_mnist(folder)
    if by_variable:
        monkeypatch.setenv("L2O_GRAPH_DATA", str(folder))
    demo.main(steps=2, root=None if by_variable else str(folder))
    assert f"data: all of FashionMNIST, in {folder}" in capsys.readouterr().out


def test_a_demo_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="steps: expected at least 1, found 0"):
        demo.main(steps=0)


def test_a_plot_that_cannot_be_written_stops_the_demo_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to folder '.*file'"):
        demo.main(steps=3, out=tmp_path / "file" / "demo.png")
