"""Zoos of CNNs: trained by command, stopped and gone on with, read back."""

import json
import math
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.stop import stopped
from torch.func import functional_call
from torch.nn import functional as F

from l2o_graph.cnn import CNNArchitecture, cnn_module, load_cnns
from l2o_graph.datasets.cnn.files import split_of, unflattened
from l2o_graph.datasets.cnn.generate import main
from l2o_graph.datasets.cnn.park import (
    ACTIVATIONS,
    CHANNELS,
    DEPTHS,
    KERNELS,
    draw_architecture,
    multiplications,
    train_park,
)
from l2o_graph.datasets.cnn.recipe import Recipe
from l2o_graph.datasets.cnn.small import (
    ARCHITECTURE,
    INITIALISATIONS,
    RULES,
    Dropout,
    Hyperparameters,
    Update,
    draw_hyperparameters,
    initial,
    logits,
    train_small,
)
from l2o_graph.datasets.images import load_images

SAMPLE = load_images("fmnist_sample")
SPLITS = ("train", "val", "test")


def run(out, *options, expect=0):
    """The command on the packaged sample, in this process."""
    given = ["--kind", "park", "--dataset", "fmnist_sample", "--runs", "9", "--steps", "4",
             "--batch", "8", "--checkpoints", "2", "--test-images", "50", "--size", "7",
             "--shard", "2", "--jobs", "1", "--out", str(out), *options]  # fmt: skip
    assert main(given) == expect


@pytest.fixture(scope="module")
def park(tmp_path_factory):
    """Nine runs of two checkpoints, in shards of two."""
    out = tmp_path_factory.mktemp("park")
    run(out)
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    run(out, "--kind", "small", "--shard", "4")
    return out


def copied(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def changed(folder, tmp_path, name, tensors=None, **record):
    """A copy of a folder with some tensors or entries of the record of one shard replaced."""
    copy = copied(folder, tmp_path)
    content = load_file(copy / name) | (tensors or {})
    with safe_open(copy / name, framework="pt") as file:
        found = json.loads(file.metadata()["record"])
    save_file(content, copy / name, {"record": json.dumps(found | record)})
    return copy


def test_splits_are_of_runs_and_hold_all_checkpoints(park):
    runs = {}
    for split in SPLITS:
        cnns = load_cnns(park, split)
        runs[split] = set(cnns.run.tolist())
        assert all(split_of(number) == split for number in runs[split])
        assert Counter(cnns.run.tolist()) == dict.fromkeys(runs[split], 2)
        assert set(cnns.step.tolist()) == {1, 4}
        assert len(cnns) == len(cnns.which) == len(cnns.accuracy) == len(cnns.values)
    assert sorted(n for numbers in runs.values() for n in numbers) == list(range(9))
    counts = Counter(map(split_of, range(2000)))
    assert counts == {"train": 1200, "val": 300, "test": 500}


@pytest.mark.parametrize("kind", ["park", "small"])
def test_accuracies_are_those_of_the_modules(kind, park, small):
    cnns = load_cnns({"park": park, "small": small}[kind], "train")
    order = torch.Generator().manual_seed(0)
    torch.randperm(6000, generator=order)
    chosen = torch.randperm(1000, generator=order)[:50]
    # Sixteen pixels to one, and to grey levels again.
    pixels = F.avg_pool2d(SAMPLE.test_x[chosen].float(), 4).round().to(torch.uint8)
    x = SAMPLE.normalise(pixels) if kind == "park" else pixels / 127.5 - 1
    for i in range(len(cnns)):
        module = cnn_module(cnns.architecture(i))
        names = [name for name, _ in module.named_parameters()]
        answers = functional_call(module, dict(zip(names, cnns.parameters(i), strict=True)), (x,))
        share = (answers.argmax(1) == SAMPLE.test_y[chosen]).float().mean()
        assert float(share) == pytest.approx(float(cnns.accuracy[i]), abs=0.021)  # of 50, one


def test_networks_are_rows_of_their_architectures_parameters(park):
    cnns = load_cnns(park, "train")
    assert len(set(cnns.architectures)) == len(cnns.architectures) > 1
    for i, row in enumerate(cnns.values):
        assert row.dtype == torch.float32
        assert [tuple(p.shape) for p in cnns.parameters(i)] == list(cnns.architecture(i).shapes)
        assert torch.equal(torch.cat([p.flatten() for p in cnns.parameters(i)]), row)
        assert cnns.parameters(i)[0].untyped_storage().data_ptr() == (
            row.untyped_storage().data_ptr()
        )


def test_the_manifest_says_what_there_is(park, small):
    for folder, split, shard in ((park, "test", "test-00000"), (small, "val", "val-00000")):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["recipe"] == {"steps": 4, "batch": 8, "checkpoints": 2}
        assert (manifest["dataset"], manifest["size"]) == ("fmnist_sample", 7)
        assert (manifest["train_images"], manifest["test_images"]) == (6000, 50)
        assert [line["run"] for line in manifest["runs"]] == list(range(9))
        cnns = load_cnns(folder, split)
        lines = [line for line in manifest["runs"] if line["split"] == split]
        assert lines[0]["shard"] == f"{shard}.safetensors"
        assert [step for line in lines for step in line["step"]] == cnns.step.tolist()
        found = torch.tensor([a for line in lines for a in line["accuracy"]])
        torch.testing.assert_close(found, cnns.accuracy)
        told = {CNNArchitecture.from_json(line["architecture"]) for line in lines}
        assert told == set(cnns.architectures)
        assert all(0 < line["hyperparameters"]["rate"] < 1 for line in lines)


def test_a_run_is_the_same_in_a_zoo_of_any_size_and_any_shard(park, tmp_path):
    run(tmp_path, "--runs", "4", "--shard", "3")
    few, many = load_cnns(tmp_path, "train"), load_cnns(park, "train")
    assert set(few.run.tolist()) < set(many.run.tolist())
    for i, row in enumerate(few.values):
        twins = (many.run == few.run[i]) & (many.step == few.step[i])
        (j,) = twins.nonzero().flatten().tolist()
        assert torch.equal(row, many.values[j])
        assert few.architecture(i) == many.architecture(j)
    run(tmp_path / "other", "--runs", "4", "--seed", "1")
    other = load_cnns(tmp_path / "other", "train")
    assert other.architectures != few.architectures


def test_the_command_says_what_came_of_it(park, tmp_path, capsys):
    run(tmp_path, "--checkpoints", "1", "--steps", "3")
    out = capsys.readouterr().out
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    for split in SPLITS:
        accuracy = 100 * load_cnns(tmp_path, split).accuracy.double()
        assert table[split][:2] == [str(len(accuracy))] * 2
        assert float(table[split][2]) == pytest.approx(float(accuracy.min()), abs=0.01)
        assert float(table[split][5]) == pytest.approx(float(accuracy.quantile(0.5)), abs=0.01)
        assert float(table[split][8]) == pytest.approx(float(accuracy.max()), abs=0.01)
    assert "9 networks" in out
    assert "trained 9 networks" in out
    assert set(load_cnns(tmp_path, "train").step.tolist()) == {3}
    run(tmp_path, "--checkpoints", "1", "--steps", "3")
    assert "trained 0 networks" in capsys.readouterr().out


# The command, which waits for a signal once a file is there. Its two workers go on meanwhile, with
# no more than what they have been given.
HELD = """
import sys
from support import hold
from l2o_graph.datasets import shards
from l2o_graph.datasets.cnn import generate

if __name__ == "__main__":
    hold.after_answer(shards, "in_parallel", 1)
    sys.exit(generate.main())
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    options = ["--kind", "small", "--runs", "12", "--steps", "20"]
    run(tmp_path / "whole", *options)
    broken = tmp_path / "broken"
    given = ["--dataset", "fmnist_sample", "--batch", "8", "--checkpoints", "2", "--test-images",
             "50", "--size", "7", "--shard", "2", "--jobs", "2"]  # fmt: skip
    status, _ = stopped(HELD, [*given, "--out", broken, *options])
    assert status == -signal.SIGKILL
    left = sorted(broken.glob("*.safetensors"))
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert 1 <= len(left) < len(names)
    before = {path: path.stat().st_mtime_ns for path in left}

    run(broken, *options)
    assert {path: path.stat().st_mtime_ns for path in left} == before, "what was done is kept"
    for name in (*names, "manifest.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (broken / name).read_bytes(), name


def test_a_zoo_grows_to_what_it_would_have_been_at_once(tmp_path, capsys):
    run(tmp_path / "grown", "--runs", "22", "--shard", "4")
    first = tmp_path / "grown" / "train-00000.safetensors"
    capsys.readouterr()
    run(tmp_path / "grown", "--runs", "26", "--shard", "4")
    trained = int(capsys.readouterr().out.split("trained ")[1].split()[0])
    run(tmp_path / "whole", "--runs", "26", "--shard", "4")
    assert trained < 26
    for path in (tmp_path / "whole").iterdir():
        if path.suffix in (".safetensors", ".json"):
            assert path.read_bytes() == (tmp_path / "grown" / path.name).read_bytes()
    assert first.exists()
    run(tmp_path / "grown", "--runs", "22", "--shard", "4", expect=2)
    assert "runs_in_all is 26, not 22" in " ".join(capsys.readouterr().err.split())


def test_missing_and_damaged_shards_are_named_and_the_rest_is_read(park, tmp_path, capsys):
    whole, copy = load_cnns(park, "train"), copied(park, tmp_path)
    names = sorted(path.name for path in copy.glob("train-*"))
    assert len(names) >= 3
    (copy / names[0]).unlink()
    damaged = copy / names[1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=f"2 of {len(names)} shards cannot be read") as caught:
        rest = load_cnns(copy, "train")
    said = str(caught[0].message)
    assert f"{names[1]}': expected a whole safetensors file" in said
    assert f"{names[0]} is missing" in said
    assert 0 < len(rest) == len(whole) - 8
    for i, row in enumerate(rest.values):
        (j,) = ((whole.run == rest.run[i]) & (whole.step == rest.step[i])).nonzero().flatten()
        assert torch.equal(row, whole.values[int(j)])
        assert rest.accuracy[i] == whole.accuracy[j]

    run(copy)
    assert "trained 4 networks" in capsys.readouterr().out
    again = load_cnns(copy, "train")
    assert all(torch.equal(a, b) for a, b in zip(again.values, whole.values, strict=True))


def test_damage_inside_of_a_shard_is_named(park, tmp_path):
    name = "train-00001.safetensors"
    tensors = load_file(park / name)
    values = next(key for key in tensors if key.startswith("values."))
    number = values.partition(".")[2]
    bad = tensors[values].clone()
    bad[1, 5] = float("nan")
    copy = changed(park, tmp_path, name, {values: bad})
    with pytest.warns(UserWarning, match=rf"{name}': .*run {number}: expected finite weights"):
        assert len(load_cnns(copy, "train")) == len(load_cnns(park, "train")) - 4
    few = {f"accuracy.{number}": tensors[f"accuracy.{number}"][:1]}
    (tmp_path / "few").mkdir()
    copy = changed(park, tmp_path / "few", name, few)
    with pytest.warns(UserWarning, match=rf"run {number}: expected 2 accuracies and param"):
        load_cnns(copy, "train")
    (copy / name).unlink()
    save_file({}, copy / name, {"record": "{}"})
    with pytest.warns(UserWarning, match=rf"{name}': expected format 'l2o_graph CNNs', version 1"):
        load_cnns(copy, "train")


def test_a_split_without_networks_is_refused(park, tmp_path):
    run(tmp_path / "few", "--runs", "2")
    with pytest.raises(ValueError) as error:
        load_cnns(tmp_path / "few", "val")
    assert str(error.value) == (
        f"CNNs '{tmp_path / 'few'}': expected networks of split 'val', in val-00000.safetensors "
        "and so on, found none: train them by python -m l2o_graph.datasets.zoo, with --runs 3 or "
        "more"
    )
    copy = copied(park, tmp_path)
    for path in copy.glob("val-*"):
        path.write_bytes(b"nonsense")
    with pytest.raises(
        ValueError, match=r"found none: CNNs .*val-00000.safetensors': expected a w"
    ):
        load_cnns(copy, "val")
    with pytest.raises(ValueError, match=r"unknown split 'valid', expected one of \['train', 'val"):
        load_cnns(park, "valid")


def test_shards_of_another_zoo_are_refused(park, tmp_path):
    copy = changed(park, tmp_path, "train-00001.safetensors", seed=9)
    with pytest.raises(
        ValueError, match=r"train-00001.safetensors': of another set: seed is 9, not"
    ):
        load_cnns(copy, "train")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--seed", "3"], "of another configuration: seed is 0, not 3; choose another --out"),
        (["--runs", "8"], "of another configuration: runs_in_all is 9, not 8"),
        (["--kind", "small"], "of another configuration: kind is park, not small"),
        (["--runs", "0"], "runs: expected at least 1, found 0"),
        (["--steps", "1"], "steps: expected at least one for each of 2 checkpoints, found 1"),
        (["--batch", "0"], "batch: expected at least 1, found 0"),
        (["--channels", "4", "8"], "of another configuration: recipe is {'steps': 4, 'batch': 8,"),
        (["--channels", "0"], "channels: expected at least 1, found 0"),
        (["--cost", "-1"], "cost: expected at least 0, found -1"),
        (["--strides", "1", "-2"], "strides: expected at least 1, found -2"),
        (["--longest", "3"], "longest: expected at least the 4 steps of the shortest run, found 3"),
        (["--kind", "small", "--longest", "9"], "longest: expected none for kind 'small'"),
        (["--kind", "small", "--strides", "1"], "strides: expected none for kind 'small'"),
        (["--size", "5"], "size: expected a divisor of 28 pixels, found 5"),
        (
            ["--test-images", "9999"],
            "test_images: expected at most 1000, the size of the test",
        ),
        (["--test-images", "-1"], "test_images: expected at least 0, found -1"),
        (["--dataset", "mnist", "--data-root", "/dev/null/x"], "dataset 'mnist' is not in"),
        (["--out", "/dev/null/x"], "Not a directory"),
    ],
)
def test_bad_requests_get_one_line(park, options, expected, capsys):
    run(park, *options, expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("zoo: ")
    assert expected in error


def test_checkpoints_are_closer_at_first_and_end_with_training():
    assert Recipe(100, 1, 10).checkpoint_steps == (1, 4, 9, 16, 25, 36, 49, 64, 81, 100)
    assert Recipe(10, 1, 10).checkpoint_steps == tuple(range(1, 11))
    for steps in range(7, 60):
        checkpoint_steps = Recipe(steps, 1, 7).checkpoint_steps
        assert sorted(set(checkpoint_steps)) == list(checkpoint_steps)
        assert checkpoint_steps[-1] == steps


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


# Park ------------------------------------------------------------------------------------------


def test_every_choice_of_the_park_is_drawn():
    drawn = [draw_architecture(g, 3) for g in generators(400)]
    assert {len(a.kernels) for a in drawn} == set(DEPTHS)
    assert {c for a in drawn for c in a.channels[1:]} == set(CHANNELS)
    assert {k for a in drawn for k in a.kernels} == set(KERNELS)
    assert {name for a in drawn for name in a.activations} == set(ACTIVATIONS)
    skips = {(i, s) for a in drawn for i, s in enumerate(a.skips)}
    # Into convolution i from hidden layers 1 to i - 1, as i reads layer i.
    assert skips == {(i, s) for i in range(5) for s in (-1, *range(1, i))}
    unequal = [a for a in drawn for i, s in enumerate(a.skips)
               if s > 0 and a.channels[s] != a.channels[i + 1]]  # fmt: skip
    assert unequal
    assert all(set(a.strides) == {1} and a.channels[0] == 3 and a.classes == 10 for a in drawn)


def test_other_widths_and_strides_are_drawn_where_they_are_asked_for():
    strides = (1, 2, 2)
    drawn = [draw_architecture(g, 3, channels=(8, 24), strides=strides) for g in generators(400)]
    assert {c for a in drawn for c in a.channels[1:]} == {8, 24}
    assert {math.prod(a.strides) for a in drawn} == {1, 2, 4}, "never more than 4 in all"
    first = [a.strides[0] for a in drawn]
    assert 0.6 < first.count(2) / len(first) < 0.73, "what is given twice is drawn twice as often"
    skips = [(a, i, s) for a in drawn for i, s in enumerate(a.skips) if s > 0]
    assert skips and all(math.prod(a.strides[s : i + 1]) == 1 for a, i, s in skips)
    # Of one seed the rest is the same: what is drawn for strides comes behind.
    usual = [draw_architecture(g, 3) for g in generators(400)]
    assert [a.activations for a in usual] == [a.activations for a in drawn]


def test_lengths_of_runs_are_drawn_and_the_rate_falls_to_their_end(tmp_path):
    run(tmp_path, "--longest", "40", "--strides", "1", "2")
    cnns = load_cnns(tmp_path, "train")
    ends = cnns.step[1::2]
    assert len(ends.unique()) > 2 and 4 <= ends.min() < ends.max() <= 40
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["recipe"] == {
        "steps": 4, "batch": 8, "checkpoints": 2, "longest": 40, "strides": [1, 2],
    }  # fmt: skip
    recipe = Recipe(10, 1, 2, longest=1000)
    lengths = [recipe.drawn(g).steps for g in generators(300)]
    assert 10 <= min(lengths) < 13 and 800 < max(lengths) <= 1000
    assert sorted(lengths)[150] == pytest.approx(100, rel=0.3), "as many below the root as above"
    before = generators(1)[0].get_state()
    (g,) = generators(1)
    assert Recipe(10, 1, 2).drawn(g) == Recipe(10, 1, 2) and torch.equal(g.get_state(), before)


def test_costly_architectures_are_drawn_again(tmp_path):
    a = CNNArchitecture((3, 8, 4), (3, 5), ("relu", "relu"), (-1, -1), (2, 1))
    counted = 0
    for fan_in, fan_out, side, pixels in ((3, 8, 3, 64), (8, 4, 5, 64)):
        counted += sum(fan_in * side * side for _ in range(pixels * fan_out))
    assert multiplications(a, (15, 16)) == counted
    run(tmp_path / "cheap", "--cost", "0.5")
    run(tmp_path / "any")
    cheap, usual = load_cnns(tmp_path / "cheap", "train"), load_cnns(tmp_path / "any", "train")
    found = [multiplications(a, (7, 7)) for a in cheap.architectures]
    assert max(found) <= 5e5 < max(multiplications(a, (7, 7)) for a in usual.architectures)
    first = [i for i, a in enumerate(usual.architectures) if multiplications(a, (7, 7)) <= 5e5]
    assert first, "what is cheap enough at once stays what it was"
    assert all(usual.architectures[i] == cheap.architectures[i] for i in first)


@pytest.mark.parametrize(("train", "steps"), [(train_park, 100), (train_small, 150)])
def test_networks_learn(train, steps, monkeypatch):
    # Sigmoids take thousands of steps.
    monkeypatch.setattr("l2o_graph.datasets.cnn.park.ACTIVATIONS", ("relu",))

    def halved(x):
        return F.avg_pool2d(x.float(), 2).round().to(torch.uint8)

    images = replace(SAMPLE, train_x=halved(SAMPLE.train_x), test_x=halved(SAMPLE.test_x[:300]),
                     test_y=SAMPLE.test_y[:300])  # fmt: skip
    runs = train(range(3, 7), generators(4, 10), images, Recipe(steps, 16, 2))
    assert [r.number for r in runs] == [3, 4, 5, 6]
    assert all(not torch.equal(*r.values) for r in runs)
    assert max(float(r.accuracy[-1]) for r in runs) > 0.3, "guessing gives 0.1"


def test_a_run_that_diverges_keeps_the_checkpoints_before(monkeypatch):
    images = replace(SAMPLE, test_x=SAMPLE.test_x[:50], test_y=SAMPLE.test_y[:50])
    monkeypatch.setattr("l2o_graph.datasets.cnn.park.RATES", (1e38, 1e38))
    monkeypatch.setattr("l2o_graph.datasets.cnn.small.RATES", (1e38, 1e38))
    for train in (train_park, train_small):
        (found,) = train([0], generators(1), images, Recipe(9, 8, 3))
        assert len(found.step) == len(found.accuracy) == len(found.values) < 3
        assert found.values.shape[1] == found.architecture.num_parameters


def test_the_command_counts_runs_that_diverged(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr("l2o_graph.datasets.cnn.park.RATES", (1e38, 1e38))
        run(tmp_path)
    said = capsys.readouterr().out
    assert "9 runs diverged: checkpoints with non-finite weights are left out" in said
    with pytest.raises(ValueError, match=r"split 'train', .* found none: every run diverged"):
        load_cnns(tmp_path, "train")


# Small networks, many at once ------------------------------------------------------------------


def test_networks_of_a_group_answer_as_alone():
    values = 0.3 * torch.randn(5, ARCHITECTURE.num_parameters)
    pixels = torch.randn(6, 5, 14, 14)
    found = logits(values, pixels)
    module = cnn_module(ARCHITECTURE)
    names = [name for name, _ in module.named_parameters()]
    for i in range(5):
        parameters = dict(zip(names, unflattened(values[i], ARCHITECTURE), strict=True))
        alone = functional_call(module, parameters, (pixels[:, i, None],))
        torch.testing.assert_close(found[:, i], alone, rtol=1e-4, atol=1e-5)
    # What one network sees and is stays its own.
    values[2] += 1
    pixels[:, 2] += 1
    other = logits(values, pixels)
    assert torch.equal(other[:, [0, 1, 3, 4]], found[:, [0, 1, 3, 4]])
    assert not torch.equal(other[:, 2], found[:, 2])


@pytest.mark.parametrize("name", sorted(RULES))
def test_steps_are_those_of_torchs_optimizers(name):
    rate, decay, size = 1e-2, 1e-2, ARCHITECTURE.num_parameters
    drawn = Hyperparameters("normal", 0.1, name, rate, 0.0, decay, 1.0)
    others = replace(drawn, optimizer="adam", rate=0.3)
    values = torch.randn(3, size)
    parameters = [p.clone().requires_grad_() for p in unflattened(values[1], ARCHITECTURE)]
    make = {
        "momentum": lambda: torch.optim.SGD(parameters, rate, momentum=0.9),
        "adam": lambda: torch.optim.Adam(parameters, rate, eps=1e-7),
        "rmsprop": lambda: torch.optim.RMSprop(parameters, rate, alpha=0.9, eps=1e-7),
    }
    optimizer, update = make[name](), Update([others, drawn, others])
    for _ in range(4):
        gradient = torch.randn(3, size)
        for p, g in zip(parameters, unflattened(gradient[1], ARCHITECTURE), strict=True):
            # The gradient of decay * (sum of squared weights), without biases.
            p.grad = g + 2 * decay * p.detach() * (p.dim() > 1)
        optimizer.step()
        update.step(values, gradient)
        expected = torch.cat([p.detach().flatten() for p in parameters])
        torch.testing.assert_close(values[1], expected, rtol=1e-4, atol=1e-6)


def test_dropout_drops_the_share_of_each_network_and_keeps_the_mean():
    shares = [0.0, 0.25, 0.5]
    x = torch.ones(40, 3 * 16, 7, 7).to(memory_format=torch.channels_last)
    dropout = Dropout(shares, torch.Generator().manual_seed(0))
    y, z = dropout(x), dropout(x)
    assert not torch.equal(y, z)
    for share, part in zip(shares, y.unflatten(1, (3, 16)).unbind(1), strict=True):
        assert float((part == 0).float().mean()) == pytest.approx(share, abs=0.01)
        kept_values = part[part != 0]
        torch.testing.assert_close(kept_values, torch.full_like(kept_values, 1 / (1 - share)))
        # No channel, image or pixel is spared.
        for axis in range(4) if share else ():
            kept = (part != 0).float().transpose(0, axis).flatten(1).mean(1)
            torch.testing.assert_close(kept, torch.full_like(kept, 1 - share), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_first_weights_have_the_deviation_of_their_kind(name):
    drawn = Hyperparameters(name, 0.2, "adam", 1e-3, 0.0, 0.0, 1.0)
    parameters = unflattened(initial(drawn, torch.Generator().manual_seed(0)), ARCHITECTURE)
    weight, bias = parameters[2], parameters[3]
    expected = {
        "normal": 0.2,
        "truncated_normal": 0.2 * 0.8796,
        "orthogonal": 1 / 12,  # rows of length 1 in 144 dimensions
        "glorot_normal": (2 / (144 + 144)) ** 0.5,
        "he_normal": (2 / 144) ** 0.5,
    }[name]
    assert float(weight.std()) == pytest.approx(expected, rel=0.05)
    assert not bias.any()
    if name == "orthogonal":
        rows = weight.flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(16), rtol=0, atol=1e-5)
    if name in ("truncated_normal", "glorot_normal", "he_normal"):
        assert float(weight.abs().max()) <= 2 / 0.8796 * expected * 1.001


def test_every_choice_of_the_small_zoo_is_drawn():
    drawn = [draw_hyperparameters(g) for g in generators(200)]
    assert {h.initialisation for h in drawn} == set(INITIALISATIONS)
    assert {h.optimizer for h in drawn} == set(RULES)
    assert {h.fraction for h in drawn} == {0.1, 0.25, 0.5, 1.0}
    assert {"normal", "truncated_normal"} == {h.initialisation for h in drawn if h.deviation}
    for name, low, high in (("rate", 1e-3, 3e-2), ("dropout", 0, 0.4), ("decay", 1e-8, 1e-2)):
        values = sorted(getattr(h, name) for h in drawn)
        assert low <= values[0] < 0.2 * high
        assert 0.8 * high < values[-1] <= high


def test_a_fraction_of_the_images_is_the_first_of_them(monkeypatch):
    monkeypatch.setattr("l2o_graph.datasets.cnn.small.FRACTIONS", (0.1,))
    few = replace(SAMPLE, test_x=SAMPLE.test_x[:50], test_y=SAMPLE.test_y[:50])
    garbled = few.train_x.clone()
    garbled[600:] = 255 - garbled[600:]
    recipe = Recipe(5, 8, 1)
    a, b = (train_small([0, 1], generators(2), images, recipe)
            for images in (few, replace(few, train_x=garbled)))  # fmt: skip
    assert all(torch.equal(x.values, y.values) for x, y in zip(a, b, strict=True))
    garbled[:600] = 255 - garbled[:600]
    (c, _) = train_small([0, 1], generators(2), replace(few, train_x=garbled), recipe)
    assert not torch.equal(a[0].values, c.values)
