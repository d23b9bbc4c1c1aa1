"""The published zoos of CNNs, in folders made as theirs are."""

import gzip
import json
import pickle
import random
import sys
from collections import defaultdict, deque
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from l2o_graph.cnn import CNNArchitecture, cnn_module
from l2o_graph.datasets.cnn.published import read_small_zoo, read_wild_park

# As layout.csv has them: biases first, (height, width, in, out), 4,970 scalars in all.
LAYOUT = [
    ("sequential/conv2d/bias:0", (16,)), ("sequential/conv2d/kernel:0", (3, 3, 1, 16)),
    ("sequential/conv2d_1/bias:0", (16,)), ("sequential/conv2d_1/kernel:0", (3, 3, 16, 16)),
    ("sequential/conv2d_2/bias:0", (16,)), ("sequential/conv2d_2/kernel:0", (3, 3, 16, 16)),
    ("sequential/dense/bias:0", (10,)), ("sequential/dense/kernel:0", (16, 10)),
]  # fmt: skip
SIZE = 4970
ROWS = 60  # three checkpoints of twenty networks


def write_layout(folder, layout=LAYOUT):
    lines, start = [",varname,start_idx,end_idx,size,shape"], 0
    for i, (name, shape) in enumerate(layout):
        stop = start + int(np.prod(shape))
        lines.append(f'{i},{name},{start},{stop},{stop - start},"{shape}"')
        start = stop
    (folder / "layout.csv").write_text("\n".join(lines) + "\n")


def metrics():
    """Of each row: step, accuracy and activation."""
    return [((0, 20, 86)[i % 3], i / 100, ("relu", "tanh")[i // 3 % 2]) for i in range(ROWS)]


@pytest.fixture
def small(tmp_path):
    """The folder, and its rows."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    rows = np.random.default_rng(0).normal(size=(ROWS, SIZE)).astype(np.float32)
    np.save(folder / "weights.npy", rows)
    write_layout(folder)
    lines = ["config.activation,config.dropout,modeldir,step,test_accuracy,test_loss"]
    lines += [f"{name},0.1,dir/{i // 3},{step},{accuracy},2.3"
              for i, (step, accuracy, name) in enumerate(metrics())]  # fmt: skip
    (folder / "metrics.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder, torch.from_numpy(rows)


def split_by_hand(order, step=86):
    """NFN's split, in a few lines of its own."""
    rows = [i for i in order if metrics()[i][0] == step]
    half = len(rows) // 2
    first = list(range(half))
    random.Random(0).shuffle(first)
    stop = int(0.8 * half)
    return {
        "train": [rows[i] for i in first[:stop]],
        "val": [rows[i] for i in first[stop:]],
        "test": rows[half:],
    }


def assert_holds(cnns, numbers, rows):
    assert cnns.run.tolist() == numbers
    expected = [metrics()[i][1] for i in numbers]
    torch.testing.assert_close(cnns.accuracy, torch.tensor(expected))
    for k, i in enumerate(numbers):
        architecture = CNNArchitecture(
            (1, 16, 16, 16), (3, 3, 3), (metrics()[i][2],) * 3, (-1,) * 3, (2,) * 3
        )
        assert cnns.architecture(k) == architecture
        # Entry by entry: [row, column, in, out] there, [out, in, row, column] here.
        kernel = rows[i, 176:2480].view(3, 3, 16, 16)
        weight, bias = cnns.parameters(k)[2:4]
        assert torch.equal(bias, rows[i, 160:176])
        for out, into, row, column in ((0, 0, 0, 0), (3, 7, 1, 2), (15, 2, 2, 0)):
            assert weight[out, into, row, column] == kernel[row, column, into, out]
        dense = rows[i, 4810:].view(16, 10)
        assert torch.equal(cnns.parameters(k)[6], dense.T)
        assert torch.equal(cnns.parameters(k)[7], rows[i, 4800:4810])


def test_the_small_zoo_is_split_as_by_nfn(small):
    folder, rows = small
    order = list(range(ROWS))
    random.Random(5).shuffle(order)
    (folder / "cifar10_split.csv").write_text("\n".join(map(str, order)) + "\n")
    expected = split_by_hand(order)
    assert {name: len(numbers) for name, numbers in expected.items()} == {
        "train": 8, "val": 2, "test": 10,
    }  # fmt: skip
    for split, numbers in expected.items():
        assert_holds(read_small_zoo(folder, split), numbers, rows)
    assert set(read_small_zoo(folder, "test").step.tolist()) == {86}
    (folder / "cifar10_split.csv").rename(folder.parent / "cifar10_split.csv")
    assert_holds(read_small_zoo(folder, "val"), expected["val"], rows)
    early = split_by_hand(order, step=20)
    assert_holds(read_small_zoo(folder, "test", step=20), early["test"], rows)


def test_without_a_file_the_split_is_one_of_our_own(small):
    folder, rows = small
    order = list(range(ROWS))
    random.Random(0).shuffle(order)
    expected = split_by_hand(order)
    for split, numbers in expected.items():
        assert_holds(read_small_zoo(folder, split), numbers, rows)
    together = sorted(n for numbers in expected.values() for n in numbers)
    assert together == [i for i in range(ROWS) if metrics()[i][0] == 86]


def test_a_network_of_the_small_zoo_computes_what_it_did(small):
    """A convolution with the axes of the file, written out, inside of the image."""
    folder, rows = small
    cnns = read_small_zoo(folder, "test")
    i, x = int(cnns.run[0]), torch.randn(1, 9, 9)
    kernel, bias = rows[i, 16:160].view(3, 3, 1, 16), rows[i, :16]
    found = F.conv2d(x[None], *cnns.parameters(0)[:2], stride=2)[0]
    for row, column, out in ((0, 0, 0), (2, 3, 9), (1, 2, 15)):
        patch = x[0, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
        expected = (patch * kernel[:, :, 0, out]).sum() + bias[out]
        torch.testing.assert_close(found[out, row, column], expected)


def test_what_is_wrong_with_a_small_zoo_is_said(small):
    folder, rows = small
    with pytest.raises(ValueError, match="unknown split 'valid', expected one of"):
        read_small_zoo(folder, "valid")
    with pytest.raises(ValueError, match="networks of split 'train' at step 85, found none"):
        read_small_zoo(folder, step=85)
    order = folder / "mine.csv"
    order.write_text("1\n1\n")
    with pytest.raises(ValueError, match=r"mine.csv': expected each of 60 rows once, found 2 num"):
        read_small_zoo(folder, order=order)
    order.write_text("one\n")
    with pytest.raises(ValueError, match=r"mine.csv': expected row numbers, found: ValueError"):
        read_small_zoo(folder, order=order)
    spoiled = rows.clone()
    spoiled[:, 7] = float("nan")
    np.save(folder / "weights.npy", spoiled.numpy())
    first = int(split_by_hand(random_order())["val"][0])
    with pytest.raises(ValueError, match=f"found others in 2 of 2 networks: row {first}, row "):
        read_small_zoo(folder, "val")
    np.save(folder / "weights.npy", rows[:10].numpy())
    with pytest.raises(ValueError, match=r"a row for each of 60 in metrics.csv, found \(10, 4970"):
        read_small_zoo(folder)
    (folder / "weights.npy").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"expected weights.npy, an array, found: "):
        read_small_zoo(folder)
    np.save(folder / "weights.npy", rows.numpy())
    write_layout(folder, [(name.replace("dense/k", "dense/other/k"), s) for name, s in LAYOUT])
    with pytest.raises(ValueError, match=r"a kernel and a bias of each layer, .*found: KeyError"):
        read_small_zoo(folder)
    write_layout(folder, [*LAYOUT, ("sequential/dense_1/kernel:0", (10, 10))])
    with pytest.raises(ValueError, match=r"with positions in rows of 4970, .*found: RuntimeError"):
        read_small_zoo(folder)
    (folder / "metrics.csv.gz").write_bytes(gzip.compress(b"step,accuracy\n86,0.5\n"))
    with pytest.raises(ValueError, match=r"metrics.csv.gz with .*found: KeyError\('test_acc"):
        read_small_zoo(folder)
    (folder / "metrics.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"metrics.csv or metrics.csv.gz with .*found: FileNotF"):
        read_small_zoo(folder)


def random_order():
    order = list(range(ROWS))
    random.Random(0).shuffle(order)
    return order


# CNN Wild Park ---------------------------------------------------------------------------------

PARK = [
    CNNArchitecture((3, 4, 8, 4), (3, 5, 7), ("relu", "", "gelu"), (-1, -1, 1), (1, 1, 1)),
    CNNArchitecture((3, 8, 4), (7, 3), ("tanh", "leaky_relu"), (-1, -1), (1, 1)),
]


def config_of(a):
    """As their sampler writes it."""
    return {
        "n_layers": len(a.kernels),
        "n_classes": a.classes,
        "channels": list(a.channels),
        "kernel_size": list(a.kernels),
        "stride": list(a.strides),
        "padding": [k // 2 for k in a.kernels],
        "residual": [s - 1 if s > 0 else -1 for s in a.skips],
        "activation": [name or "none" for name in a.activations],
    }


@pytest.fixture
def pickled_config(monkeypatch):
    """A function: a dict -> the same as classes of a module that a reader does not have.

    They keep what they hold where omegaconf's do.
    """
    module = ModuleType("omegaconf_of_the_authors")

    def new(name):
        kind = type(name, (), {"__module__": module.__name__})
        setattr(module, name, kind)
        return kind

    dict_config, list_config, node, metadata = map(new, ("Dict", "List", "Node", "Metadata"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def wrapped(value, parent=None):
        if isinstance(value, dict):
            made = dict_config()
            made._content = {key: wrapped(each, made) for key, each in value.items()}
        elif isinstance(value, list):
            made = list_config()
            made._content = [wrapped(each, made) for each in value]
        else:
            made = node()
            made._val = value
        made._parent, made._metadata = parent, metadata()
        made._metadata.ref_type = dict_config
        return made

    def without_module(save):
        save()
        monkeypatch.delitem(sys.modules, module.__name__)

    return wrapped, without_module


def state(architecture, seed):
    torch.manual_seed(seed)
    return cnn_module(architecture).state_dict()


def checkpoint(seed, config, **more):
    architecture = PARK[seed % 2]
    return {
        "model": state(architecture, seed),
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3}]},
        "config": config,
        "iteration": 10 * seed + 9,
        "last_result": {"test/acc": 0.1 + seed / 100, "date": "2023-05-01"},
        **more,
    }


@pytest.fixture
def park(tmp_path):
    """Six runs of two checkpoints, in plain dicts."""
    folder = tmp_path / "park"
    for seed in range(12):
        run, number = divmod(seed, 2)
        path = folder / "cifar10_zooV2" / f"NN_{run:05d}" / f"checkpoint_{number:06d}"
        path.mkdir(parents=True)
        torch.save(checkpoint(seed, config_of(PARK[seed % 2])), path / "checkpoint.pt")
    return folder


def path_of(seed):
    run, number = divmod(seed, 2)
    return f"cifar10_zooV2/NN_{run:05d}/checkpoint_{number:06d}/checkpoint.pt"


def assert_park(cnns, seeds, accuracy, step):
    torch.testing.assert_close(cnns.accuracy, torch.tensor(accuracy))
    assert cnns.step.tolist() == step
    for i, seed in enumerate(seeds):
        assert cnns.architecture(i) == PARK[seed % 2]
        for found, expected in zip(cnns.parameters(i), state(PARK[seed % 2], seed).values(),
                                   strict=True):  # fmt: skip
            assert torch.equal(found, expected)


def test_the_park_is_read_by_its_splits(park):
    listing = {
        "train": {"path": [path_of(s) for s in (5, 0, 1)], "score": [0.5, 0.1, 0.2],
                  "step": [30, 10, 20]},
        "val": {"path": [path_of(2).removeprefix("cifar10_zooV2/")], "score": [0.3], "step": [9]},
    }  # fmt: skip
    (park / "cnn_park_splits.json").write_text(json.dumps(listing))
    train = read_wild_park(park, "train")
    assert_park(train, [5, 0, 1], [0.5, 0.1, 0.2], [30, 10, 20])
    assert train.run.tolist() == [0, 1, 1]
    assert_park(read_wild_park(park / "cifar10_zooV2", "train", park / "cnn_park_splits.json"),
                [5, 0, 1], [0.5, 0.1, 0.2], [30, 10, 20])  # fmt: skip
    assert_park(read_wild_park(park / "cifar10_zooV2", "val"), [2], [0.3], [9])


def test_without_its_splits_runs_are_split_here(park):
    seen = []
    for split, runs in (("train", (0, 3, 4)), ("test", (1, 5)), ("val", (2,))):
        seeds = [2 * run + k for run in runs for k in (0, 1)]
        accuracy, step = [0.1 + s / 100 for s in seeds], [10 * s + 9 for s in seeds]
        assert_park(read_wild_park(park, split), seeds, accuracy, step)
        seen += seeds
    assert sorted(seen) == list(range(12))


def test_configurations_are_read_without_the_library_that_wrote_them(park, pickled_config):
    wrapped, without_module = pickled_config
    config = wrapped({"data": {"root": "x"}, "model": config_of(PARK[0])})._content["model"]
    place = park / path_of(0)
    without_module(lambda: torch.save(checkpoint(0, config), place))
    with pytest.raises((ImportError, AttributeError)):
        torch.load(place, weights_only=False)
    assert_park(read_wild_park(park, "train"), [0, 1, 6, 7, 8, 9],
                [0.1 + s / 100 for s in (0, 1, 6, 7, 8, 9)],
                [10 * s + 9 for s in (0, 1, 6, 7, 8, 9)])  # fmt: skip


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_code_in_a_pickle_is_not_executed(park, tmp_path):
    victim = tmp_path / "victim"
    strange = [Malicious(str(victim)), deque([1, 2]), defaultdict(int, a=1), {3}, np.float64(4)]
    content = checkpoint(0, config_of(PARK[0]), strange=strange)
    torch.save(content, park / path_of(0))
    read_wild_park(park, "train")
    assert not victim.exists()
    pickle.loads(pickle.dumps(Malicious(str(victim)))).close()
    assert victim.exists(), "what it would have done"


def test_what_is_wrong_with_a_park_is_said(park, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'valid', expected one of"):
        read_wild_park(park, "valid")
    with pytest.raises(
        ValueError, match=r"split 'train' like cifar10_zooV2/run/checkpoint_000010/"
    ):
        read_wild_park(tmp_path / "nothing")
    listing = tmp_path / "mine.json"
    entry = {"path": [path_of(0), "a/b/checkpoint.pt"], "score": [0.1, 0.2], "step": [1, 2]}
    listing.write_text(json.dumps({"train": entry}))
    with pytest.raises(ValueError, match=r"2 files of split 'train' in 'mine.json', 1 are missing: "
                       r"a/b/checkpoint.pt"):  # fmt: skip
        read_wild_park(park, "train", listing)
    listing.write_text(json.dumps({"train": {**entry, "score": [0.1]}}))
    with pytest.raises(ValueError, match=r"mine.json': expected lists \['path', 'score', 'step'\]"):
        read_wild_park(park, "train", listing)
    place = park / path_of(0)
    torch.save(checkpoint(0, config_of(PARK[1])), place)
    with pytest.raises(ValueError, match=r"checkpoint.pt': expected parameters \[\(8, 3, 7, 7\), "):
        read_wild_park(park, "train")
    torch.save(checkpoint(0, {}), place)
    with pytest.raises(ValueError, match=r"expected a checkpoint, found: KeyError\('channels"):
        read_wild_park(park, "train")
    content = checkpoint(0, config_of(PARK[0]))
    content["model"]["linear.bias"][3] = float("inf")
    torch.save(content, place)
    with pytest.raises(ValueError, match=r"checkpoint.pt': expected finite weights, found others"):
        read_wild_park(park, "train")
    place.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"checkpoint.pt': expected a checkpoint, found: "):
        read_wild_park(park, "train")
