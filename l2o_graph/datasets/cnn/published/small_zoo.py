"""Reader of the Small CNN Zoo (Unterthiner et al. 2020), for the folder of one dataset.

weights.npy      (n, 4970): flattened parameters, one row per network
layout.csv       varname, start_idx, end_idx and shape of each parameter in a row
metrics.csv.gz   test_accuracy, step, modeldir, config.activation and more for each row

The formats are those in the code of google-research/dnn_predict_accuracy and AllanYangZhou/nfn.
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

FINAL_STEP = 86  # number of epochs at the end of training
STRIDES = (2, 2, 2)  # default of the authors' train_network.py

ORDER_FILES = "*_split.csv"  # such as NFN's cifar10_split.csv
TEST_SHARE, TRAIN_SHARE = 0.5, 0.8

METRICS = ("step", "test_accuracy", "config.activation")
LAYOUT = ("varname", "start_idx", "end_idx", "shape")
# Permutations to torch's order of axes, by the number of axes of a parameter: (row, height, width,
# in, out) to (row, out, in, height, width), and (row, in, out) to (row, out, in).
AXES = {4: (0, 4, 3, 1, 2), 2: (0, 2, 1), 1: (0, 1)}


def read_small_zoo(
    folder: str | Path,
    split: str = "train",
    order: str | Path | None = None,
    step: int = FINAL_STEP,
) -> CNNs:
    """Read networks of the Small CNN Zoo.

    The splits are those of NFN (Zhou et al. 2023). In a fixed random order, the second half is the
    test split. The first half is shuffled again; its last fifth is for validation, the rest for
    training. For CIFAR-10 there are 12,000, 3,000 and 15,000 networks.

    Args:
        folder: Folder with weights.npy, layout.csv and metrics.csv; the tables may be gzipped.
        split: "train", "val" or "test".
        order: NFN's file with a row number per line, such as cifar10_split.csv; by default the
            only file in the folder, or else in its parent, whose name ends in _split.csv. Without
            such a file, rows are shuffled by Python's ``random.Random(0)``.
        step: Number of epochs. Splits at different steps do not have the same networks.

    Returns:
        Networks in this order, with torch's layout of parameters; ``run`` is the row in the file.
        The original convolutions have no padding, which ``CNNArchitecture`` cannot express, so
        modules of the architecture differ near the borders of images.

    Raises:
        ValueError: For an unknown split, files or columns that are missing or damaged, and
            networks with weights that are not finite, naming them.
    """
    check_split(split)
    folder = Path(folder)
    table = _table(folder, "metrics.csv", METRICS)
    with expecting(f"small zoo '{folder}', metrics.csv: expected steps and accuracies"):
        metrics = [(int(float(at)), float(accuracy), name) for at, accuracy, name in table]
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
    """Read columns of a CSV file, gzipped or not, as rows."""
    path = folder / name
    what = f"small zoo '{folder}': expected {name} or {name}.gz with the columns {list(columns)}"
    with expecting(what, passing=()):
        opened = path.open if path.exists() else partial(gzip.open, f"{path}.gz")
        with opened("rt", newline="") as file:
            return [[row[column] for column in columns] for row in csv.DictReader(file)]


def _order(folder: Path, given: str | Path | None, rows: int) -> list[int]:
    """Return the numbers of all rows in the order that is split."""
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
    """Return the positions of a split among ordered entries."""
    half = int(TEST_SHARE * count)
    if split == "test":
        return list(range(half, count))
    rest = list(range(half))
    random.Random(0).shuffle(rest)
    stop = int(TRAIN_SHARE * len(rest))
    return rest[:stop] if split == "train" else rest[stop:]


def _rearranged(folder: Path, rows: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """Convert rows (n, P) to torch's layout, weight before bias; return shapes and rows."""
    parts: dict[str, Tensor] = {}
    table = _table(folder, "layout.csv", LAYOUT)
    with expecting(
        f"small zoo '{folder}', layout.csv: expected a kernel and a bias of each layer, with "
        f"positions in rows of {rows.shape[1]}, and shapes"
    ):
        for name, start, stop, shape in table:
            part = rows[:, int(start) : int(stop)].unflatten(1, tuple(literal_eval(shape)))
            parts[name.removesuffix(":0")] = part.permute(AXES[part.dim() - 1])
        layers = dict.fromkeys(name.rpartition("/")[0] for name in parts)
        ordered = [parts[f"{layer}/{kind}"] for layer in layers for kind in ("kernel", "bias")]
    shapes = [tuple(part.shape[1:]) for part in ordered]
    return shapes, torch.cat([part.flatten(1) for part in ordered], dim=1)


def _architecture(shapes: Sequence[tuple[int, ...]], activation: str) -> CNNArchitecture:
    """Derive the architecture from the shapes of parameters in torch's layout."""
    kernels = [shape for shape in shapes if len(shape) == 4]
    return CNNArchitecture(
        channels=(kernels[0][1], *(kernel[0] for kernel in kernels)),
        kernels=tuple(kernel[2] for kernel in kernels),
        activations=(activation,) * len(kernels),
        skips=(NO_SKIP,) * len(kernels),
        strides=STRIDES[: len(kernels)],
        classes=shapes[-1][0],
    )
