"""Predictors of accuracy are trained, judged on runs they did not see, killed and gone on with."""

import dataclasses
import json

import jaxtyping
import pytest
import torch
from support.one_by_one import cnns, park
from support.pictures import size
from support.stop import check_resumes

from l2o_graph import GeneralizationPredictor
from l2o_graph.cnn import augmented, chosen, cnn_config, load_cnns
from l2o_graph.datasets.cnn.generate import main as train_zoo
from l2o_graph.datasets.cnn.small import ARCHITECTURE
from meta_train.__main__ import main
from meta_train.benchmarks import tables
from meta_train.supervised.cnn import (
    CNNTrainer,
    CNNTrainingConfig,
    default_recipe,
    held_out,
    kendall,
    load_zoo,
    paper_recipe,
    train_cnn_model,
)

TINY = CNNTrainingConfig(
    task="cnn_park", model=cnn_config("ng_gnn", hidden=4, layers=2), epochs=3, batch=8, piece=3,
    warmup=0, cooldown=0.0, evaluate_every=3, save_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Nine runs of three checkpoints each, in all three splits."""
    out = tmp_path_factory.mktemp("zoo")
    given = ["--kind", "park", "--dataset", "fmnist_sample", "--runs", "9", "--steps", "6"]
    given += ["--batch", "8", "--checkpoints", "3", "--test-images", "50", "--size", "7"]
    assert train_zoo([*given, "--jobs", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def whole(zoo, tmp_path_factory):
    """A run that nobody stopped; tests read it alone."""
    return train_cnn_model(TINY, zoo, tmp_path_factory.mktemp("runs") / "whole")


def records(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def trainer_of(config, zoo) -> CNNTrainer:
    splits = {split: load_zoo(zoo, split) for split in ("train", "val", "test")}
    return CNNTrainer(config, splits, torch.device("cpu"), "")


def test_a_checkpoint_says_how_far_off_it_was_on_runs_it_chose_by(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("meta_train.supervised.cnn.LEVELS", (0.4, 0.9))
    result = train_cnn_model(dataclasses.replace(TINY, epochs=1), zoo, tmp_path / "run")
    model = GeneralizationPredictor.from_checkpoint(result.checkpoint)
    val, test = load_cnns(zoo, "val"), load_cnns(zoo, "test")
    train = load_cnns(zoo, "train").accuracy
    ends = [train.min().item(), train.max().item()]
    assert model.provenance["seen"]["accuracy"] == pytest.approx(ends, abs=1e-6)
    told = model.provenance["residuals"]
    assert told["runs"] == len(val.run.unique()) < 9
    off = (model(val).double().logit(1e-3) - val.accuracy.double().logit(1e-3)).abs()
    assert told["widths"][-1] == pytest.approx(off.max().item(), abs=1e-4)
    low, high = model.interval(model(test), 0.4)
    inside = ((low <= test.accuracy) & (test.accuracy <= high)).double().mean().item()
    assert model.provenance["test_cover_40"] == pytest.approx(inside)
    assert "test_cover_90" not in model.provenance, "so few runs cannot speak for it"
    assert "val_cover_40" not in model.provenance


def test_a_run_leaves_a_log_the_best_model_and_what_it_predicts(zoo, whole):
    log = records(whole.log)
    (*points, last) = (r for r in log if "val_tau" in r)
    assert not any("test_tau" in p for p in points), "the test split is read once, at the end"
    steps = [r["step"] for r in log if "loss" in r]
    assert whole.finished and steps == list(range(1, whole.steps + 1))
    assert [p["step"] for p in points] == [0, *range(3, whole.steps, 3), whole.steps]

    model = GeneralizationPredictor.from_checkpoint(whole.checkpoint)
    first_best = max(points, key=lambda p: (p["val_tau"], -p["step"]))
    assert model.provenance["step"] == first_best["step"]
    assert model.provenance["seen"]["classes"] == [10, 10]
    test = load_cnns(zoo, "test")
    predicted = model(test)
    assert kendall(predicted, test.accuracy) == pytest.approx(last["test_tau"])
    lines = records(whole.state.with_name("predictions.jsonl"))
    assert [line["run"] for line in lines] == test.run.tolist()
    assert [line["step"] for line in lines] == test.step.tolist()
    assert [line["accuracy"] for line in lines] == test.accuracy.tolist()
    found = torch.tensor([line["prediction"] for line in lines])
    torch.testing.assert_close(found, predicted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_training_learns_the_networks_it_sees(loss, zoo):
    model = dataclasses.replace(TINY.model, hidden=16, dropout=0.0)
    config = dataclasses.replace(TINY, model=model, loss=loss, lr=1e-2, batch=12, piece=12)
    trainer = trainer_of(config, zoo)
    train = trainer.zoo["train"]
    train.accuracy[:] = torch.where(train.run % 2 == 0, 0.9, 0.1)
    for _ in range(12):
        trainer.advance()
    with torch.no_grad():
        error = (trainer.model(train) - train.accuracy).square().mean()
    assert error < 0.5 * train.accuracy.var()  # of a constant it would be all of it


def test_a_step_is_the_same_in_pieces_of_any_size(zoo):
    model = dataclasses.replace(TINY.model, dropout=0.0)
    after = []
    for piece in (3, 8):
        trainer = trainer_of(dataclasses.replace(TINY, model=model, piece=piece), zoo)
        after.append((trainer.advance()["loss"], [p.grad for p in trainer.model.parameters()]))
    (loss, grads), (same_loss, same_grads) = after
    assert loss == pytest.approx(same_loss, rel=1e-5)
    torch.testing.assert_close(grads, same_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["ng_t", "stat_nn"])
def test_every_model_trains(model, zoo):
    trainer = trainer_of(dataclasses.replace(TINY, model=cnn_config(model, hidden=4)), zoo)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.advance()
    after = list(trainer.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert -1 <= trainer.evaluate()["val_tau"] <= 1


@pytest.mark.parametrize("trait", ["depth=2", "activation=relu"])
def test_what_is_held_out_is_tested_and_not_trained_on(trait):
    key, value = trait.split("=")
    all_of_them = cnns(park(12))
    splits = held_out(dict.fromkeys(("train", "val", "test"), all_of_them), trait)
    for split, networks in splits.items():
        for i in range(len(networks)):
            found = networks.architecture(i)
            have = {"depth": [str(len(found.kernels))], "activation": found.activations}[key]
            assert (value in have) == (split == "test")
    assert len(splits["train"]) + len(splits["test"]) == len(all_of_them)


def test_a_checkpoint_has_not_seen_what_is_held_out(zoo, tmp_path):
    depths = [len(a.kernels) for a in load_cnns(zoo, "test").architectures]
    config = dataclasses.replace(TINY, epochs=1, hold_out=f"depth={depths[0]}")
    result = train_cnn_model(config, zoo, tmp_path / "run")
    seen = GeneralizationPredictor.from_checkpoint(result.checkpoint).provenance["seen"]["depth"]
    rest = [len(a.kernels) for a in load_cnns(zoo, "train").architectures]
    rest = [depth for depth in rest if depth != depths[0]]
    assert seen == [min(rest), max(rest)]


def test_a_trait_that_cannot_be_held_out_is_named(zoo):
    splits = {split: load_zoo(zoo, split) for split in ("train", "val", "test")}
    for bad in ("colour=red", "depth"):
        with pytest.raises(ValueError, match=f"hold_out: expected TRAIT=VALUE, .* found '{bad}'"):
            held_out(splits, bad)
    with pytest.raises(ValueError, match="expected networks of split 'test' with depth=9"):
        held_out(splits, "depth=9")
    with pytest.raises(ValueError, match="expected networks of split 'train' without classes="):
        held_out(splits, "classes=10")


def test_tau_counts_pairs_in_order_against_pairs_out_of_order():
    truth = torch.tensor([0.1, 0.2, 0.2, 0.4])
    assert kendall(truth, truth) == pytest.approx(1)
    assert kendall(-truth, truth) == pytest.approx(-1)
    # Five pairs that truth orders, four of them in order, of all six pairs predicted.
    assert kendall(torch.tensor([2.0, 1.0, 3.0, 4.0]), truth) == pytest.approx(3 / 30**0.5)
    assert kendall(torch.ones(4), truth) == 0


def test_augmentation_changes_every_network_and_its_size_little():
    networks = cnns([ARCHITECTURE, ARCHITECTURE, *park(1)])
    changed = augmented(networks, torch.Generator().manual_seed(0))
    again = augmented(networks, torch.Generator().manual_seed(0))
    for i, row in enumerate(networks.values):
        difference = changed.values[i] - row
        kept = changed.values[i] != 0
        assert 0.98 < kept.float().mean() < 1
        assert torch.equal(changed.values[i], again.values[i])
        weight = networks.parameters(i)[0]
        noise = difference[: weight.numel()][kept[: weight.numel()]]
        assert noise.std().item() == pytest.approx(0.1 * weight.std().item(), rel=0.3)
    assert torch.equal(changed.which, networks.which)


def test_chosen_networks_come_in_their_order():
    networks = cnns(park(4))
    some = chosen(networks, torch.tensor([3, 1]))
    assert [some.architecture(i) for i in range(2)] == [networks.architecture(i) for i in (3, 1)]
    assert some.run.tolist() == [3, 1] and torch.equal(some.values[0], networks.values[3])


def test_a_killed_run_comes_to_the_same_weights(zoo, tmp_path, whole):
    check_resumes(train_cnn_model, CNNTrainer, __name__, zoo, tmp_path, records, whole)


def test_requests_that_cannot_be_met(zoo, tmp_path, whole, capsys, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which is quicker to refuse
    with pytest.raises(ValueError, match=r"loss: expected 'mse' or 'bce', found 'mae'"):
        dataclasses.replace(TINY, loss="mae")
    with pytest.raises(ValueError, match="piece: expected at least 1, found 0"):
        dataclasses.replace(TINY, piece=0)
    with pytest.raises(ValueError, match=r"another configuration: .*batch is 8, not 4"):
        other = dataclasses.replace(TINY, batch=4)
        train_cnn_model(other, zoo, whole.state.parent, resume=True)
    assert main(["--task", "cnn_park", "--zoo", str(tmp_path / "nothing")]) == 2
    assert "expected networks of split 'train'" in capsys.readouterr().err
    assert main(["--task", "cnn_park", "--model", "nfn", "--zoo", str(zoo)]) == 2
    assert "reads networks of a single architecture" in capsys.readouterr().err
    given = ["--task", "cnn_small", "--model", "nfn", "--hidden", "2", "--batch", "8"]
    assert main([*given, "--zoo", str(zoo), "--out", str(tmp_path / "nfn")]) == 2
    assert "NFN: expected only networks of the architecture" in capsys.readouterr().err


def test_recipes():
    """Ours has no noise; the paper's numbers are those of its section 4.2 and of its scripts."""
    ours, paper = default_recipe("cnn_small", "ng_t", hidden=16), paper_recipe("cnn_small", "ng_t")
    assert (ours.augment, ours.cooldown, ours.model.hidden) == (False, 0.5, 16)
    assert (ours.model.dropout, ours.model.fourier, ours.model.scaled) == (0.0, 0.0, True)
    assert (ours.lr, ours.batch, default_recipe().lr, default_recipe().batch) == (3e-3, 8, 1e-3, 16)
    of_probes = [default_recipe(task, "probegen") for task in ("cnn_park", "cnn_small")]
    assert [(recipe.lr, recipe.model.logits) for recipe in of_probes] == [
        (3e-4, False),
        (1e-3, True),
    ]
    assert not default_recipe(model="stat_nn").model.scaled
    assert not default_recipe(fourier=1.0).model.scaled
    assert (paper.augment, paper.cooldown, paper.warmup, paper.clip) == (True, 0.0, 0, 10.0)
    assert (paper.epochs, paper.batch, paper.loss, paper.model.hidden) == (300, 192, "bce", 128)
    assert (paper_recipe("cnn_small").batch, paper_recipe("cnn_small").loss) == (128, "mse")
    park = paper_recipe("cnn_park")
    assert (park.augment, park.epochs, park.batch, park.loss) == (False, 10, 128, "bce")
    assert (park.model.dropout, park.model.fourier, park.model.scaled) == (0.2, 3.0, False)
    with pytest.raises(ValueError, match="unknown task 'park', expected one of"):
        paper_recipe("park")


def test_the_command(zoo, tmp_path, capsys):
    given = ["--task", "cnn_park", "--model", "ng_t", "--hidden", "8", "--loss", "mse"]
    given += [
        "--no-activations",
        "--reverse",
        "--no-scaled",
        "--epochs",
        "1",
        "--batch",
        "8",
        "--seed",
        "2",
    ]
    out = tmp_path / "run"
    assert main([*given, "--zoo", str(zoo), "--out", str(out)]) == 0
    assert "log in" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["model"]["model"], config["model"]["activations"]) == ("ng_t", False)
    assert config["model"]["reverse"] and not config["model"]["scaled"]
    assert (config["loss"], config["seed"], config["augment"]) == ("mse", 2, False)
    out = tmp_path / "paper"
    given = ["--task", "cnn_park", "--hidden", "4", "--preset", "paper", "--epochs", "1"]
    assert main([*given, "--augment", "--zoo", str(zoo), "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["augment"], config["batch"], config["model"]["fourier"]) == (True, 128, 3.0)


def test_a_table_of_predictors_with_its_picture(zoo, tmp_path):
    given = [
        "cnn_park",
        "--only",
        "NG-T without",
        "NG-GNN without",
        "--seeds",
        "1",
        "--hidden",
        "4",
    ]
    given += ["--out", str(tmp_path), "--", "--zoo", str(zoo), "--epochs", "1", "--batch", "8"]
    assert tables.main(given) == 0
    rows = (tmp_path / "cnn_park-some.md").read_text().splitlines()[2:4]
    models = ("ng_gnn", "ng_t")
    for label, row, model in zip(("NG-GNN", "NG-T"), rows, models, strict=True):
        assert row.startswith(f"| {label} without activations |")
        folder = tmp_path / "cnn_park" / f"{model}-no-activations-0"
        found = tables.provenance(folder / "checkpoint.safetensors")
        assert f"| {found['test_tau']:.3f} |" in row
    assert size((tmp_path / "cnn_park-some.png").read_bytes())[0] > 500


def test_a_table_of_what_is_held_out(zoo, tmp_path):
    depths = {len(a.kernels) for a in load_cnns(zoo, "test").architectures}
    row = tables.Row("StatNN", f"stat_nn --hold-out depth={min(depths)}")
    held = dataclasses.replace(tables.TABLES["cnn_held_out"], rows=(row,))
    given = ["cnn_held_out", "--seeds", "1", "--out", str(tmp_path), "--", "--zoo", str(zoo)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tables.TABLES, "cnn_held_out", held)
        assert tables.main([*given, "--epochs", "1"]) == 0
    folder = tmp_path / "cnn_held_out" / f"stat_nn-hold-out-depth={min(depths)}-0"
    assert tables.provenance(folder / "checkpoint.safetensors")["config"]["task"] == "cnn_park"
