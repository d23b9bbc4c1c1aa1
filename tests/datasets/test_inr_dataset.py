"""Sets of INRs: fitted by command, stopped and gone on with, read back; and the published ones."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.photographs import photographs
from support.stop import stopped

from l2o_graph.datasets.images import load_images
from l2o_graph.datasets.inr import generate
from l2o_graph.datasets.inr.files import write_shard
from l2o_graph.datasets.inr.generate import Settings, layout_for, main, plan
from l2o_graph.inr import RECIPES, fit, initialise, load_inrs, psnr, read_published, render
from l2o_graph.storage.shards import shard_name

SAMPLE = load_images("fmnist_sample")


def run(out, *options, expect=0):
    """The command on the packaged sample, in this process."""
    given = ["--source", "fmnist_sample", "--jobs", "1", "--steps", "3", "--shard", "8",
             "--batch", "4", "--out", str(out), *options]  # fmt: skip
    assert main(given) == expect


def tensors(inrs):
    return [*inrs.weights, *inrs.biases, inrs.labels, inrs.index, inrs.view, inrs.psnr]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """20, 3 and 5 images in shards of 8, the training images twice."""
    out = tmp_path_factory.mktemp("inrs")
    run(out, "--count", "20", "3", "5", "--views", "2")
    return out


def changed(folder, tmp_path, name, **replaced):
    """A copy of a folder with one shard's tensors or record replaced."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = load_file(copy / name)
    with safe_open(copy / name, framework="pt") as file:
        record = json.loads(file.metadata()["record"])
    content |= {k: v for k, v in replaced.items() if isinstance(v, torch.Tensor)}
    record |= {k: v for k, v in replaced.items() if not isinstance(v, torch.Tensor)}
    save_file(content, copy / name, {"record": json.dumps(record)})
    return copy


def test_each_split_holds_its_images_in_order(small):
    train, val, test = (load_inrs(small, split) for split in ("train", "val", "test"))
    assert train.index.tolist() == 2 * list(range(20))
    assert train.view.tolist() == 20 * [0] + 20 * [1]
    # The sample has 6,000 training images, the last 500 of them for validation.
    assert val.index.tolist() == [5500, 5501, 5502]
    assert test.index.tolist() == list(range(5))
    assert not test.view.any()
    assert not val.view.any()
    for inrs, labels in ((train, SAMPLE.train_y), (val, SAMPLE.train_y), (test, SAMPLE.test_y)):
        assert torch.equal(inrs.labels, labels[inrs.index])
        assert (inrs.layout, inrs.omega0) == ((2, 32, 32, 1), 30.0)
        assert [tuple(w.shape[1:]) for w in inrs.weights] == [(32, 2), (32, 32), (1, 32)]
    assert len(train) == 40


def test_networks_are_fitted_to_their_image_and_their_psnr_is_on_record(small):
    for split, images in (("train", SAMPLE.train_x), ("val", SAMPLE.train_x),
                          ("test", SAMPLE.test_x)):  # fmt: skip
        inrs = load_inrs(small, split)
        found = psnr(render(inrs.weights, inrs.biases), images[inrs.index, 0].float() / 255)
        assert torch.equal(found, inrs.psnr)


def test_the_header_says_how_they_came_about(small):
    with safe_open(small / "train-00004.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["record"])
    assert record["format"] == "l2o_graph INRs"
    assert record["version"] == 1
    assert (record["source"], record["split"], record["seed"]) == ("fmnist_sample", "train", 0)
    assert (record["shard"], record["shards"], record["views"]) == (4, 5, 2)
    assert (record["layout"], record["omega0"]) == ([2, 32, 32, 1], 30.0)
    assert record["recipe"] == {
        "steps": 3, "lr": 2e-3, "betas": [0.9, 0.95], "tail": 0.25, "grids": 2, "stop": None,
        "output": "sine",
    }  # fmt: skip
    assert record["torch"] == torch.__version__


def test_first_weights_are_of_each_image_and_view_alone(small, tmp_path):
    train = load_inrs(small, "train")
    # More images, other shards, one view: those that both have are the same to the bit.
    run(tmp_path / "more", "--count", "29", "0", "0", "--shard", "5")
    more = load_inrs(tmp_path / "more", "train")
    for a, b in zip((*train.weights, *train.biases), (*more.weights, *more.biases), strict=True):
        assert torch.equal(a[:20], b[:20])
    run(tmp_path / "other", "--count", "20", "0", "0", "--seed", "1")
    other = load_inrs(tmp_path / "other", "train")
    weight, bound = train.weights[0], (6 / 2) ** 0.5 / 30
    assert not torch.equal(weight[:20], weight[20:]), "each view starts elsewhere"
    assert float((weight[:20] - other.weights[0]).abs().max()) > bound
    assert float((weight[:20] - weight[20:]).abs().max()) > bound


def test_another_batch_changes_rounding_alone(small, tmp_path):
    run(tmp_path / "a", "--count", "9", "0", "0", "--batch", "8")
    a, b = load_inrs(tmp_path / "a", "train"), load_inrs(small, "train")
    for x, y in zip(a.weights, b.weights, strict=True):
        torch.testing.assert_close(x, y[:9], rtol=1e-3, atol=1e-5)


def test_counts_are_given_for_all_splits_or_in_proportion(tmp_path):
    def images(*count):
        shards = plan(Settings("fmnist_sample", tmp_path, count=count))
        return {shard.record["split"]: shard.record["images"] for shard in shards}

    assert images() == {"train": 5500, "val": 500, "test": 1000}
    assert images(1100) == {"train": 1100, "val": 100, "test": 200}
    assert images(1, 0, 3) == {"train": 1, "test": 3}


def test_the_command_says_what_came_of_it(small, tmp_path, capsys):
    run(tmp_path / "a", "--count", "6", "2", "0", "--recipe", "published")
    out = capsys.readouterr().out
    quantiles = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    for split, count in (("train", 6), ("val", 2)):
        inrs = load_inrs(tmp_path / "a", split)
        assert int(quantiles[split][0]) == count
        assert float(quantiles[split][1]) == pytest.approx(float(inrs.psnr.min()), abs=0.01)
        assert float(quantiles[split][4]) == pytest.approx(float(inrs.psnr.quantile(0.5)), abs=0.01)
    assert "fitted 8 INRs" in out
    assert (tmp_path / "a" / "figure.png").read_bytes().startswith(b"\x89PNG")
    # Again: all is there.
    run(tmp_path / "a", "--count", "6", "2", "0", "--recipe", "published")
    assert "fitted 0 INRs" in capsys.readouterr().out


# The command, which waits for a signal once a file is there. Its two workers go on meanwhile, with
# no more than what they have been given.
HELD = """
import sys
from support import hold
from l2o_graph.datasets import shards
from l2o_graph.datasets.inr import generate

if __name__ == "__main__":
    hold.after_answer(shards, "in_parallel", 1)
    sys.exit(generate.main())
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    options = ["--count", "48", "0", "0", "--steps", "20"]
    run(tmp_path / "whole", *options)
    broken = tmp_path / "broken"
    given = ["--source", "fmnist_sample", "--jobs", "2", "--shard", "8", "--batch", "4"]
    status, _ = stopped(HELD, [*given, "--out", broken, *options])
    assert status == -signal.SIGKILL
    left = sorted(broken.glob("train-*"))
    assert 1 <= len(left) < 6
    before = {path: path.stat().st_mtime_ns for path in left}
    with pytest.raises(ValueError, match=r"\d+ shards of split 'train' cannot be read: train-"):
        load_inrs(broken, "train")

    run(broken, *options)
    assert {path: path.stat().st_mtime_ns for path in left} == before, "what was done is kept"
    for path in sorted((tmp_path / "whole").glob("train-*")):
        assert path.read_bytes() == (broken / path.name).read_bytes()
    assert len(load_inrs(broken, "train")) == 48


def test_a_set_grows_to_what_it_would_have_been_at_once(tmp_path, capsys):
    """20 are two whole shards and a part of one, which is fitted anew."""
    run(tmp_path / "grown", "--count", "20", "3", "5")
    capsys.readouterr()
    run(tmp_path / "grown", "--count", "40", "3", "9")
    assert "fitted 33 INRs" in capsys.readouterr().out  # 40 - 16, and 9 of the test split
    run(tmp_path / "whole", "--count", "40", "3", "9")
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) == 5 + 1 + 2
    for name in names:
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    run(tmp_path / "grown", "--count", "20", "3", "5", expect=2)
    assert "images is 40, not 20" in " ".join(capsys.readouterr().err.split())


def test_views_do_not_let_a_set_grow(small, capsys):
    """Second views begin after all images: other rows would be others."""
    run(small, "--count", "24", "3", "5", "--views", "2", expect=2)
    assert "images is 20, not 24" in " ".join(capsys.readouterr().err.split())


def test_a_folder_is_named_by_its_source(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--source", "fmnist_sample", "--jobs", "1", "--steps", "3", "--count", "1", "0", "0"]
    assert main(given) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["inr-fmnist_sample"]
    assert main([*given, "--recipe", "published"]) == 2
    assert "of another configuration: recipe is" in capsys.readouterr().err


def test_a_damaged_shard_is_named_and_fitted_anew(tmp_path, capsys):
    options = ["--count", "20", "0", "0"]
    run(tmp_path, *options)
    whole = load_inrs(tmp_path, "train")
    path = tmp_path / "train-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-00001.safetensors': expected a whole safetensors"):
        load_inrs(tmp_path, "train")
    capsys.readouterr()
    run(tmp_path, *options)
    assert "fitted 8 INRs" in capsys.readouterr().out
    assert equal(load_inrs(tmp_path, "train"), whole)


def test_missing_shards_are_named(small, tmp_path):
    copy = changed(small, tmp_path, "train-00000.safetensors")
    for number in (0, 3):
        (copy / f"train-0000{number}.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        load_inrs(copy, "train")
    assert str(error.value) == (
        f"INRs '{copy}': 2 shards of split 'train' cannot be read: train-00000.safetensors is "
        "missing, train-00003.safetensors is missing; run the same command again to fit them"
    )
    with pytest.raises(ValueError, match=r"expected shards of split 'valid', valid-00000.safet"):
        load_inrs(copy, "valid")


def test_weights_that_are_not_finite_are_reported_by_number(small, tmp_path):
    name = "train-00003.safetensors"
    content = load_file(small / name)
    bias = content["bias.1"].clone()
    bias[5, 7] = float("nan")
    copy = changed(small, tmp_path, name, **{"bias.1": bias})
    with pytest.raises(ValueError, match=r"finite weights, found others in 1 of 40 networks: 29 \("
                       r"image 9\)$"):  # fmt: skip
        load_inrs(copy, "train")


@pytest.mark.parametrize(
    ("replaced", "expected"),
    [
        (
            {"format": "something else"},
            "expected format 'l2o_graph INRs', version 1, in its",
        ),
        ({"version": 2}, "found 'l2o_graph INRs', 2"),
        ({"seed": 9}, "of another set: seed is 9, not 0"),
        ({"shard": 1}, "of another set: shard is 1, not 2"),
    ],
)
def test_shards_of_something_else_are_refused(small, tmp_path, replaced, expected):
    copy = changed(small, tmp_path, "train-00002.safetensors", **replaced)
    with pytest.raises(ValueError, match=expected) as error:
        load_inrs(copy, "train")
    assert "train-00002.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--seed", "3"], "of another configuration: seed is 0, not 3; choose another --out"),
        (["--steps", "4"], "is of another configuration: recipe is {'steps': 3"),
        (["--count", "21", "3", "5"], "images is 20, not 21"),
        (["--count", "5501"], "count: expected 0 to 5500 images of split 'train', found 5501"),
        (["--count", "1", "2"], "count: expected one number or three, found [1, 2]"),
        (["--count", "0"], "count: expected at least one image, found [0]"),
        (["--views", "0"], "views: expected at least 1, found 0"),
        (["--batch", "9"], "batch: expected at most --shard, 8, found 9"),
        (["--device", "nonsense"], "device: cannot use 'nonsense'"),
        (["--source", "mnist", "--data-root", "/dev/null/x"], "dataset 'mnist' is not in"),
        (["--out", "/dev/null/x"], "Not a directory"),
    ],
)
def test_bad_requests_get_one_line(small, options, expected, capsys):
    run(small, "--count", "20", "3", "5", "--views", "2", *options, expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("inr: ")
    assert expected in error


@pytest.fixture
def in_colour(monkeypatch):
    images = photographs()
    monkeypatch.setattr(generate, "_load", lambda source, data_root: images)
    return images


def test_networks_of_colours_have_an_output_a_channel(in_colour, tmp_path):
    run(tmp_path, "--source", "cifar10", "--count", "12", "4", "8", "--steps", "40")
    with safe_open(tmp_path / "train-00001.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["record"])["layout"] == [2, 32, 32, 3]
    for split, x in (("train", in_colour.train_x), ("test", in_colour.test_x)):
        inrs = load_inrs(tmp_path, split)
        assert inrs.layout == (2, 32, 32, 3)
        drawn = render(inrs.weights, inrs.biases, (8, 8))
        assert torch.equal(psnr(drawn, x[inrs.index].float() / 255), inrs.psnr)
        assert bool((psnr(drawn, x[inrs.index.roll(1)].float() / 255) < inrs.psnr).all())
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_images_that_come_class_by_class_are_taken_by_turns(in_colour, tmp_path):
    run(tmp_path, "--source", "cifar10", "--count", "12", "4", "8")
    train, val, test = (load_inrs(tmp_path, split) for split in ("train", "val", "test"))
    assert train.labels.tolist() == 3 * [0, 1, 2, 3] and val.labels.tolist() == [0, 1, 2, 3]
    assert train.index.tolist() == [0, 12, 24, 36, 1, 13, 25, 37, 2, 14, 26, 38]
    assert val.index.tolist() == [11, 23, 35, 47], "a twelfth of the training images, the last"
    assert test.index.tolist() == [0, 5, 10, 15, 1, 6, 11, 16]
    for inrs, y in ((train, in_colour.train_y), (test, in_colour.test_y)):
        assert torch.equal(y[inrs.index], inrs.labels)


def test_a_fit_that_diverges_is_reported_and_not_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "default", replace(RECIPES["default"], lr=1e30))
    run(tmp_path, "--count", "9", "0", "0", expect=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "train-00000.safetensors, just fitted: expected finite weights" in error
    assert "8 of 8 networks: 0 (image 0), 1 (image 1)" in error
    assert not list(tmp_path.glob("*.safetensors"))


def state_dict(seed, **more):
    weights, biases = initialise([torch.Generator().manual_seed(seed)], output="linear")
    content = {f"seq.{i}.weight": w[0] for i, w in enumerate(weights)}
    content |= {f"seq.{i}.bias": b[0] for i, b in enumerate(biases)}
    return content | more


@pytest.fixture
def published(tmp_path):
    """Both folders as they are published, and what is in them."""
    mnist, fmnist = tmp_path / "mnist-inrs", tmp_path / "fmnist_inrs"
    for seed, (half, label, image) in enumerate(
        [("training", 5, 0), ("training", 4, 54_999), ("training", 9, 55_000), ("testing", 7, 0)]
    ):
        path = mnist / f"mnist_png_{half}_{label}_{image}" / "checkpoints" / "model_final.pth"
        path.parent.mkdir(parents=True)
        torch.save(state_dict(seed), path)
    for seed, (half, label, image) in enumerate(
        [("train", 2, 11), ("train", 3, 7), ("test", 1, 7)]
    ):
        path = fmnist / half / f"model_{image}.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state_dict(seed, label=label), path)
    return mnist, fmnist


def assert_holds(inrs, seeds, labels, index):
    assert inrs.labels.tolist() == labels
    assert inrs.index.tolist() == index
    assert (inrs.layout, inrs.omega0, inrs.psnr) == ((2, 32, 32, 1), 30.0, None)
    for i, seed in enumerate(seeds):
        expected = state_dict(seed)
        for j, (w, b) in enumerate(zip(inrs.weights, inrs.biases, strict=True)):
            assert torch.equal(w[i], expected[f"seq.{j}.weight"])
            assert torch.equal(b[i], expected[f"seq.{j}.bias"])


def test_published_folders_are_read_as_they_are(published):
    mnist, fmnist = published
    assert_holds(read_published(mnist, "train"), [0, 1], [5, 4], [0, 54_999])
    assert_holds(read_published(mnist, "val"), [2], [9], [55_000])
    assert_holds(read_published(mnist, "test"), [3], [7], [0])
    assert_holds(read_published(fmnist, "train"), [1, 0], [3, 2], [7, 11])
    assert_holds(read_published(fmnist, "test"), [2], [1], [7])


def test_published_networks_can_be_kept_as_shards(published, tmp_path):
    record = {"split": "train", "shard": 0, "shards": 1, "omega0": 30.0}
    write_shard(tmp_path / shard_name("train", 0), read_published(published[0], "train"), record)
    assert_holds(load_inrs(tmp_path, "train"), [0, 1], [5, 4], [0, 54_999])


def test_published_splits_are_taken_from_their_json(published):
    mnist, fmnist = published
    tail = "checkpoints/model_final.pth"
    splits = {
        "train": {"path": [f"dataset/mnist-inrs/mnist_png_training_9_55000/{tail}",
                           f"dataset/mnist-inrs/mnist_png_training_5_0/{tail}"],
                  "label": ["9", "5"]},
        "val": {"path": [f"dataset/mnist-inrs/mnist_png_training_4_54999/{tail}"], "label": ["4"]},
    }  # fmt: skip
    (mnist.parent / "mnist_splits.json").write_text(json.dumps(splits))
    assert_holds(read_published(mnist, "train"), [2, 0], [9, 5], [55_000, 0])
    assert_holds(read_published(mnist, "val"), [1], [4], [54_999])
    listing = fmnist / "splits.json"
    listing.write_text(json.dumps({"train": ["/home/them/data/train/model_11.pth"]}))
    assert_holds(read_published(fmnist, "train"), [0], [2], [11])
    listing.write_text(json.dumps({"train": {"path": ["fmnist_inrs/train/model_7.pth"],
                                             "label": [3]}}))  # fmt: skip
    assert_holds(read_published(fmnist, "train", splits=listing), [1], [3], [7])


def test_what_is_wrong_with_a_published_folder_is_said(published, tmp_path):
    mnist, fmnist = published
    with pytest.raises(ValueError, match="unknown split 'valid', expected one of"):
        read_published(mnist, "valid")
    with pytest.raises(ValueError, match="expected files of split 'train' like mnist_png_train"):
        read_published(tmp_path / "nothing")
    listing = tmp_path / "mine.json"
    listing.write_text(json.dumps({"train": ["train/model_7.pth", "train/model_8.pth"]}))
    with pytest.raises(ValueError, match=r"expected 2 files of split 'train' in 'mine.json', 1 "
                       r"are missing: train/model_8.pth"):  # fmt: skip
        read_published(fmnist, "train", splits=listing)
    with pytest.raises(ValueError, match=r"mine.json': expected lists \['path', 'label'\] for 'va"):
        read_published(fmnist, "val", splits=listing)
    broken = state_dict(0, label=1)
    broken["seq.1.weight"] = broken["seq.1.weight"].clone()
    broken["seq.1.weight"][3, 3] = float("inf")
    torch.save(broken, fmnist / "train" / "model_11.pth")
    with pytest.raises(ValueError, match=r"in 1 of 2 networks: 1 \(image 11\)"):
        read_published(fmnist, "train")
    torch.save(state_dict(0), fmnist / "train" / "model_11.pth")
    with pytest.raises(ValueError, match=r"model_11.pth': expected a label, found: KeyError"):
        read_published(fmnist, "train")
    torch.save({**state_dict(0, label=1), "seq.0.weight": torch.zeros(9, 2)},
               fmnist / "train" / "model_11.pth")  # fmt: skip
    with pytest.raises(ValueError, match=r"model_11.pth': expected the layers of 'model_7.pth', "):
        read_published(fmnist, "train")
    (fmnist / "train" / "model_11.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"model_11.pth': expected a state dict, found: "):
        read_published(fmnist, "train")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "least"), [("mnist", 28.0), ("fmnist", 27.0), ("cifar10", 27.0)]
)
def test_the_default_recipe_fits_real_images(source, least):
    try:
        images = (load_images(source).train_x[:64].float() / 255).squeeze(1)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    generators = [torch.Generator().manual_seed(i) for i in range(64)]
    fitted = fit(images, *initialise(generators, layout_for(source)))
    drawn = render(*fitted, (images.shape[-2], images.shape[-1]))
    assert float(psnr(drawn, images).median()) >= least
