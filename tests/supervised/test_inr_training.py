"""Models of INRs are trained, judged on splits they did not see, killed and gone on with."""

import dataclasses
import itertools
import json
import time

import pytest
import torch
from safetensors.torch import load_file
from support.photographs import photographs
from support.pictures import size
from support.stop import check_resumes

from l2o_graph.datasets.inr import generate
from l2o_graph.datasets.inr.generate import main as fit_inrs
from l2o_graph.inr import INRClassifier, inr_config, load_inr_model, load_inrs, render
from meta_train.__main__ import main
from meta_train.benchmarks.rows import accuracies, edited_digits
from meta_train.supervised.epochs import rate_at
from meta_train.supervised.inr import (
    EDITED,
    INRTrainer,
    INRTrainingConfig,
    default_recipe,
    load_examples,
    paper_recipe,
    train_inr_model,
)

TINY = INRTrainingConfig(
    task="sample_inr", model=inr_config("ng_gnn", hidden=8, layers=2, probes=2),
    epochs=3, batch=8, warmup=2, evaluate_every=3, save_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def inrs(tmp_path_factory):
    """24 images to train on, 8 and 8 to judge by."""
    out = tmp_path_factory.mktemp("inrs")
    given = ["--source", "fmnist_sample", "--jobs", "1", "--steps", "60", "--batch", "8"]
    assert fit_inrs([*given, "--count", "24", "8", "8", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def in_colour(tmp_path_factory):
    """24 images in colour to train on, 4 and 8 to judge by."""
    out = tmp_path_factory.mktemp("colours")
    given = ["--source", "cifar10", "--jobs", "1", "--steps", "20", "--batch", "8"]
    images = photographs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_load", lambda source, data_root: images)
        assert fit_inrs([*given, "--count", "24", "4", "8", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def whole(inrs, tmp_path_factory):
    """A run that nobody stopped; tests read it alone."""
    return train_inr_model(TINY, inrs, tmp_path_factory.mktemp("runs") / "whole")


def records(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_the_rate_warms_up_stays_and_cools_down(inrs, tmp_path):
    config = dataclasses.replace(TINY, lr=1.0, warmup=4, cooldown=0.5)
    rates = [rate_at(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and set(rates[4:11]) == {1.0}
    assert rates[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert rate_at(dataclasses.replace(config, cooldown=0.0), 19, 20) == 1.0

    log = records(train_inr_model(config, inrs, tmp_path / "run").log)
    assert [r["lr"] for r in log if "lr" in r] == [rate_at(config, step, 9) for step in range(9)]


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_cooldown_is_a_share(share):
    with pytest.raises(ValueError, match="cooldown: expected from 0 to 1"):
        dataclasses.replace(TINY, cooldown=share)


def test_a_run_leaves_a_log_and_the_best_model(inrs, whole):
    assert (whole.finished, whole.steps) == (True, 9)
    log = records(whole.log)
    assert [r["step"] for r in log if "loss" in r] == list(range(1, 10))
    (*points, last) = (r for r in log if "val_loss" in r)
    assert [p["step"] for p in points] == [0, 3, 6, 9]
    assert not any("test_loss" in p for p in points), "the test split is read once, at the end"
    assert [val for _, val in accuracies(whole.log)] == [p["val_accuracy"] for p in points[1:]]

    model = INRClassifier.from_checkpoint(whole.checkpoint)
    first_best = max(points, key=lambda p: (p["val_accuracy"], -p["step"]))
    assert model.provenance["step"] == first_best["step"]
    test = load_inrs(inrs, "test")
    right = model(test.weights, test.biases).argmax(1) == test.labels
    assert right.float().mean().item() == pytest.approx(last["test_accuracy"])
    assert first_best.items() <= last.items() <= model.provenance.items()


def test_minutes_set_the_number_of_steps_by_the_time_of_the_first(inrs, tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 0.05 * next(ticks))  # 0.05 s a step
    config = dataclasses.replace(TINY, minutes=0.005)
    result = train_inr_model(config, inrs, tmp_path / "run")
    assert (result.steps, result.finished) == (6, True)
    assert [r["step"] for r in records(result.log) if "loss" in r] == list(range(1, 7))
    monkeypatch.setattr(time, "perf_counter", lambda: 0.5 * next(ticks))
    again = train_inr_model(config, inrs, tmp_path / "run", resume=True)
    assert (again.steps, again.finished) == (6, True), "the plan is part of the state"


def test_training_learns_the_networks_it_sees(inrs):
    config = dataclasses.replace(TINY, cooldown=0.0, warmup=1, lr=5e-3, batch=24)
    # Graph models go up and down at rates that get them as far in so few steps.
    config = dataclasses.replace(config, model=inr_config("ordered", hidden=16, dropout=0.0))
    trainer = INRTrainer(config, load_examples("sample_inr", inrs, None), torch.device("cpu"), "")
    losses = [trainer.advance()["loss"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "model", ["ng_t", "ordered", "probegen", "mlp", "stat_nn", "set_nn", "dwsnet", "nfn"]
)
def test_every_model_trains(model, inrs):
    config = dataclasses.replace(
        TINY, model=inr_config(model, hidden=8, layers=2), augment="small-mirrored"
    )
    trainer = INRTrainer(config, load_examples("sample_inr", inrs, None), torch.device("cpu"), "")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.advance()
    after = list(trainer.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert 0 <= trainer.evaluate()["val_accuracy"] <= 1


@pytest.mark.parametrize("model", ["ordered", "ng_gnn"])
def test_models_read_networks_of_colours(model, in_colour, tmp_path):
    given = ["--task", "cifar10_inr", "--model", model, "--probes", "2", "--hidden", "8"]
    given += ["--epochs", "2", "--batch", "8", "--inrs", str(in_colour), "--out", str(tmp_path)]
    assert main(given) == 0
    reader = INRClassifier.from_checkpoint(tmp_path / "checkpoint.safetensors")
    assert reader.config.layout == (2, 32, 32, 3)
    test = load_inrs(in_colour, "test")
    right = reader(test.weights, test.biases).argmax(1) == test.labels
    assert right.float().mean().item() == pytest.approx(reader.provenance["test_accuracy"])


def test_grey_networks_and_those_of_colours_are_not_taken_for_each_other(
    inrs, in_colour, tmp_path, capsys
):
    given = ["--model", "mlp", "--hidden", "8", "--epochs", "1", "--out", str(tmp_path)]
    for task, folder, layouts in (
        ("cifar10_inr", inrs, "(2, 32, 32, 3), found (2, 32, 32, 1)"),
        ("mnist_inr", in_colour, "(2, 32, 32, 1), found (2, 32, 32, 3)"),
    ):
        assert main(["--task", task, "--inrs", str(folder), *given]) == 2
        assert f"INRs '{folder}': expected layout {layouts}" in capsys.readouterr().err


def test_an_editor_starts_next_to_leaving_images_as_they_are(inrs, tmp_path):
    model = inr_config("ng_gnn", "edit", hidden=8, layers=2)
    config = dataclasses.replace(TINY, task="sample_dilation", model=model, epochs=1)
    result = train_inr_model(config, inrs, tmp_path / "run")
    first = records(result.log)[0]
    splits = load_examples("sample_dilation", inrs, None)
    val, test = splits["val"], splits["test"]
    drawn = render(val.networks.weights, val.networks.biases)
    untouched = (drawn - val.targets).square().mean().item()
    drawn = render(test.networks.weights, test.networks.biases)
    assert first["val_loss"] == pytest.approx(untouched, rel=0.25)
    edited = load_inr_model(result.checkpoint)(test.networks.weights, test.networks.biases)
    assert render(*edited).shape == test.targets.shape

    shown = load_file(result.checkpoint.with_name(EDITED))
    torch.testing.assert_close(shown["drawn"], drawn)
    torch.testing.assert_close(shown["edited"], render(*edited), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shown["target"], test.targets)
    one = edited_digits({"NG-GNN": tmp_path / "run"})
    two = edited_digits({"NG-GNN": tmp_path / "run", "again": tmp_path / "run"})
    assert size(two)[1] > size(one)[1]


def test_a_killed_run_comes_to_the_same_weights(inrs, tmp_path, whole):
    check_resumes(train_inr_model, INRTrainer, __name__, inrs, tmp_path, records, whole)


def test_another_configuration_is_named(inrs, whole):
    other = dataclasses.replace(TINY, batch=4)
    with pytest.raises(ValueError, match="another configuration: batch is 8, not 4"):
        train_inr_model(other, inrs, whole.state.parent, resume=True)


def test_requests_that_cannot_be_met(inrs, tmp_path, capsys):
    with pytest.raises(ValueError, match="expected a model to edit, found one to classify"):
        INRTrainingConfig(task="mnist_dilation", model=inr_config("ng_gnn"))
    with pytest.raises(ValueError, match="batch: expected at least 1, found 0"):
        dataclasses.replace(TINY, batch=0)
    with pytest.raises(ValueError, match="clip: expected at least 0, found -1"):
        dataclasses.replace(TINY, clip=-1.0)
    config = dataclasses.replace(TINY, model=inr_config("mlp", layout=(2, 16, 1)))
    with pytest.raises(ValueError, match=r"expected layout \(2, 16, 1\), found \(2, 32, 32, 1\)"):
        train_inr_model(config, inrs, tmp_path / "run")
    config = dataclasses.replace(TINY, model=inr_config("mlp", omega0=20.0))
    with pytest.raises(ValueError, match=r"expected omega0 20.0, found 30.0"):
        train_inr_model(config, inrs, tmp_path / "run")
    with pytest.raises(ValueError, match="seed: expected from 0 to 268435455, found 268435456"):
        dataclasses.replace(TINY, seed=1 << 28)
    status = main(["--task", "mnist_inr", "--inrs", str(tmp_path / "nothing")])
    assert status == 2
    said = capsys.readouterr().err
    assert "expected shards of split 'train'" in said and "by python -m l2o_graph.data" in said
    assert main(["--task", "mnist_inr", "--device", "nonsense"]) == 2
    assert "meta_train: device: cannot use 'nonsense'" in capsys.readouterr().err


def test_recipes():
    """Ours has no noise; the paper's numbers are those of its section 4.1 and of its scripts."""
    ours, paper = default_recipe("mnist_inr", "ng_t", probes=4), paper_recipe("fmnist_inr")
    assert (ours.augment, ours.cooldown, ours.model.probes) == ("none", 0.5, 4)
    assert (ours.model.dropout, ours.model.fourier) == (0.0, 0.0)
    assert (paper.augment, paper.cooldown) == ("published", 0.0)
    assert (paper.model.dropout, paper.model.fourier) == (0.2, 3.0)
    assert (paper.epochs, paper.batch, paper.warmup, paper.clip) == (150, 128, 1000, 10.0)
    edits = paper_recipe("mnist_dilation")
    assert (edits.epochs, edits.warmup, edits.clip, edits.augment) == (200, 10_000, 1.0, "none")
    assert paper_recipe().epochs == 100
    for recipe in (default_recipe, paper_recipe):
        assert recipe("fmnist_inr", "ordered").model.layout == (2, 32, 32, 1)
        assert recipe("cifar10_inr", "ordered").model.layout == (2, 32, 32, 3)
    with pytest.raises(ValueError, match="unknown task 'inr', expected one of"):
        paper_recipe("inr")


def test_the_command(inrs, tmp_path, capsys):
    given = ["--task", "sample_inr", "--model", "ng_t", "--probes", "2", "--hidden", "8"]
    given += ["--dropout", "0.5", "--reverse"]
    given += ["--no-positions", "--augment", "small", "--epochs", "1", "--batch", "12"]
    out = tmp_path / "run"
    assert main([*given, "--inrs", str(inrs), "--out", str(out)]) == 0
    assert "2 steps, log in" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["model"]["model"], config["model"]["probes"]) == ("ng_t", 2)
    assert (config["model"]["hidden"], config["model"]["dropout"]) == (8, 0.5)
    assert config["model"]["reverse"]
    assert (config["model"]["positions"], config["augment"], config["epochs"]) == (
        False,
        "small",
        1,
    )
    out = tmp_path / "paper"
    given = ["--task", "sample_inr", "--hidden", "8", "--preset", "paper", "--epochs", "1"]
    assert main([*given, "--inrs", str(inrs), "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["augment"], config["batch"], config["model"]["fourier"]) == (
        "published",
        128,
        3.0,
    )
