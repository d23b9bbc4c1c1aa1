"""The Small CNN Zoo (Unterthiner et al. 2020), in the folder of a dataset that it comes in.

weights.npy      (n, 4970): all parameters of a network in a row
layout.csv       varname, start_idx, end_idx and shape: where each lies in a row
metrics.csv.gz   for each row test_accuracy, step, modeldir, config.activation and more

What is known of them is what google-research/dnn_predict_accuracy and AllanYangZhou/nfn say.
"""

import csv
import gzip
import random
from ast import literal_eval
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l2o_graph.datasets.cnn.architecture import NO_SKIP, CNNArchitecture
from l2o_graph.datasets.cnn.files import CNNs, gathered, run_of
from l2o_graph.storage.files import expecting
from l2o_graph.storage.shards import check_split, named

FINAL_STEP = 86  # epochs, at the end of training
STRIDES = (2, 2, 2)  # the default of their train_network.py

ORDER_FILES = "*_split.csv"  # as NFN's cifar10_split.csv
TEST_SHARE, TRAIN_SHARE = 0.5, 0.8

METRICS = ("step", "test_accuracy", "config.activation")
LAYOUT = ("varname", "start_idx", "end_idx", "shape")
# By the number of axes of a parameter, its axes and that of the rows in torch's order, (out, in,
# height, width): there they are (height, width, in, out), and (in, out) of the dense layer.
AXES = {4: (0, 4, 3, 1, 2), 2: (0, 2, 1), 1: (0, 1)}


def read_small_zoo(
    folder: str | Path,
    split: str = "train",
    order: str | Path | None = None,
    step: int = FINAL_STEP,
) -> CNNs:
    """Read networks of the Small CNN Zoo.

    They are split as by NFN (Zhou et al. 2023): in a fixed random order the second half is for
    the test; the first, shuffled anew, for training, and its last fifth for validation. Of
    CIFAR-10 these are 12,000, 3,000 and 15,000 networks.

    Args:
        folder: With weights.npy, layout.csv and metrics.csv, the tables perhaps packed by gzip.
        split: "train", "val" or "test".
        order: NFN's file with a row number a line, such as cifar10_split.csv; by default the only
            one in the folder, else beside it, whose name ends in _split.csv. Without one, rows
            are shuffled by Python's ``random.Random(0)``.
        step: Epochs done. Splits of different steps are not of the same networks.

    Returns:
        The networks in their order, laid out as torch does; ``run`` is the row in the file.
        Convolutions of these networks pad nothing, which an architecture does not tell: its
        module answers otherwise near borders.

    Raises:
        ValueError: For an unknown split, files or columns that are missing or damaged, and
            networks that are not finite; each by name or number.
    """
    check_split(split)
    folder = Path(folder)
    table = _table(folder, "metrics.csv", METRICS)
    with expecting(f"small zoo '{folder}', metrics.csv: expected steps and accuracies"):
        metrics = [(int(float(done)), float(right), name) for done, right, name in table]
    rows = [i for i in _order(folder, order, len(metrics)) if metrics[i][0] == step]
    chosen = [rows[i] for i in _positions(len(rows), split)]
    if not chosen:
        raise ValueError(
            f"small zoo '{folder}': expected networks of split '{split}' at step {step}, found none"
        )
    with expecting(f"small zoo '{folder}': expected weights.npy, an array", passing=()):
        values = np.load(folder / "weights.npy", mmap_mode="r", allow_pickle=False)
    if values.ndim != 2 or len(values) != len(metrics):
        raise ValueError(
            f"small zoo '{folder}': expected weights.npy with a row for each of {len(metrics)} in "
            f"metrics.csv, found {values.shape}"
        )
    picked = torch.from_numpy(values[chosen].astype(np.float32))
    bad = (~picked.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"small zoo '{folder}': expected finite weights, found others in {len(bad)} of "
            f"{len(chosen)} networks: {named([f'row {chosen[i]}' for i in bad])}"
        )
    shapes, rearranged = _rearranged(folder, picked)
    runs = []
    for i, row in zip(chosen, rearranged, strict=True):
        _, accuracy, activation = metrics[i]
        runs.append(run_of(i, _architecture(shapes, activation), {}, [(step, accuracy, row)]))
    return gathered(runs)


def _table(folder: Path, name: str, columns: Sequence[str]) -> list[list[str]]:
    """Rows of some columns of a CSV file, packed by gzip or not."""
    path = folder / name
    what = f"small zoo '{folder}': expected {name} or {name}.gz with the columns {list(columns)}"
    with expecting(what, passing=()):
        opened = path.open if path.exists() else partial(gzip.open, f"{path}.gz")
        with opened("rt", newline="") as file:
            return [[row[column] for column in columns] for row in csv.DictReader(file)]


def _order(folder: Path, given: str | Path | None, rows: int) -> list[int]:
    """All rows in the order in which they are split."""
    candidates = [sorted(place.glob(ORDER_FILES)) for place in (folder, folder.parent)]
    files = [found[0] for found in candidates if len(found) == 1]
    if given is None and not files:
        order = list(range(rows))
        random.Random(0).shuffle(order)
        return order
    path = files[0] if given is None else Path(given)
    with expecting(f"order '{path}': expected row numbers", passing=()):
        order = [int(line) for line in path.read_text().split()]
    if sorted(order) != list(range(rows)):
        raise ValueError(
            f"order '{path}': expected each of {rows} rows once, found {len(order)} numbers from "
            f"{min(order, default=0)} to {max(order, default=0)}"
        )
    return order


def _positions(count: int, split: str) -> list[int]:
    """Which of some ordered entries are of a split."""
    half = int(TEST_SHARE * count)
    if split == "test":
        return list(range(half, count))
    rest = list(range(half))
    random.Random(0).shuffle(rest)
    stop = int(TRAIN_SHARE * len(rest))
    return rest[:stop] if split == "train" else rest[stop:]


def _rearranged(folder: Path, rows: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """Shapes of all parameters in torch's order, and rows of them: of a layer the weight first."""
    parts: dict[str, Tensor] = {}
    table = _table(folder, "layout.csv", LAYOUT)
    with expecting(
        f"small zoo '{folder}', layout.csv: expected of each layer a kernel and a bias, their "
        f"places in rows of {rows.shape[1]}, and shapes"
    ):
        for name, start, stop, shape in table:
            part = rows[:, int(start) : int(stop)].unflatten(1, tuple(literal_eval(shape)))
            parts[name.removesuffix(":0")] = part.permute(AXES[part.dim() - 1])
        layers = dict.fromkeys(name.rpartition("/")[0] for name in parts)
        ordered = [parts[f"{layer}/{kind}"] for layer in layers for kind in ("kernel", "bias")]
    shapes = [tuple(part.shape[1:]) for part in ordered]
    return shapes, torch.cat([part.flatten(1) for part in ordered], dim=1)


def _architecture(shapes: Sequence[tuple[int, ...]], activation: str) -> CNNArchitecture:
    """The architecture of parameters in torch's order."""
    kernels = [shape for shape in shapes if len(shape) == 4]
    return CNNArchitecture(
        channels=(kernels[0][1], *(kernel[0] for kernel in kernels)),
        kernels=tuple(kernel[2] for kernel in kernels),
        activations=(activation,) * len(kernels),
        skips=(NO_SKIP,) * len(kernels),
        strides=STRIDES[: len(kernels)],
        classes=shapes[-1][0],
    )
