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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor

from l2o_graph.datasets.cnn.architecture import NO_SKIP, CNNArchitecture
from l2o_graph.datasets.cnn.files import CNNs, gathered, run_of
from l2o_graph.storage.shards import check_split, named

FINAL_STEP = 86  # epochs, at the end of training
STRIDES = (2, 2, 2)  # the default of their train_network.py

ORDER_FILES = "*_split.csv"  # as NFN's cifar10_split.csv
TEST_SHARE, TRAIN_SHARE = 0.5, 0.8


@dataclass(frozen=True, slots=True)
class _Row:
    """What is read of a row of metrics.csv."""

    step: int
    accuracy: float
    activation: str


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
    metrics = _metrics(folder)
    values = _weights(folder, len(metrics))
    rows = [i for i in _order(folder, order, len(metrics)) if metrics[i].step == step]
    chosen = [rows[i] for i in _positions(len(rows), split)]
    if not chosen:
        raise ValueError(
            f"small zoo '{folder}': expected networks of split '{split}' at step {step}, found none"
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
        architecture = _architecture(shapes, metrics[i].activation)
        runs.append(run_of(i, architecture, {}, [(step, metrics[i].accuracy, row)]))
    return gathered(runs)


@contextmanager
def _table(folder: Path, name: str) -> Iterator[TextIO]:
    """A CSV file, packed or not."""
    path, packed = folder / name, folder / f"{name}.gz"
    if not path.exists() and not packed.exists():
        raise ValueError(f"small zoo '{folder}': expected {name} or {name}.gz, found neither")
    if path.exists():
        with path.open(newline="") as file:
            yield file
    else:
        with gzip.open(packed, "rt", newline="") as file:
            yield file


def _columns(folder: Path, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a CSV file that has some columns."""
    try:
        with _table(folder, name) as file:
            reader = csv.DictReader(file)
            missing = [c for c in columns if c not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"small zoo '{folder}', {name}: expected the columns {list(columns)}, "
                    f"{missing} are missing"
                )
            yield from reader
    except (OSError, EOFError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"small zoo '{folder}', {name}: expected a table, found: {error}"
        ) from error


def _metrics(folder: Path) -> list[_Row]:
    columns = ("step", "test_accuracy", "config.activation")
    rows = []
    for i, row in enumerate(_columns(folder, "metrics.csv", columns)):
        step, accuracy, activation = (row[column] for column in columns)
        try:
            rows.append(_Row(int(float(step)), float(accuracy), activation))
        except ValueError as error:
            raise ValueError(
                f"small zoo '{folder}', metrics.csv, row {i}: expected numbers, found: {error}"
            ) from error
    return rows


def _weights(folder: Path, rows: int) -> np.ndarray:
    try:
        values = np.load(folder / "weights.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"small zoo '{folder}': expected weights.npy, an array, found: {error}"
        ) from error
    if values.ndim != 2 or len(values) != rows:
        raise ValueError(
            f"small zoo '{folder}': expected weights.npy with a row for each of {rows} in "
            f"metrics.csv, found {values.shape}"
        )
    return values


def _order(folder: Path, given: str | Path | None, rows: int) -> list[int]:
    """All rows in the order in which they are split."""
    path = Path(given) if given is not None else _find_order(folder)
    if path is None:
        order = list(range(rows))
        random.Random(0).shuffle(order)
        return order
    try:
        order = [int(line) for line in path.read_text().split()]
    except (OSError, ValueError) as error:
        raise ValueError(f"order '{path}': expected row numbers, found: {error}") from error
    if sorted(order) != list(range(rows)):
        raise ValueError(
            f"order '{path}': expected each of {rows} rows once, found {len(order)} numbers from "
            f"{min(order, default=0)} to {max(order, default=0)}"
        )
    return order


def _find_order(folder: Path) -> Path | None:
    for place in (folder, folder.parent):
        found = sorted(place.glob(ORDER_FILES))
        if len(found) == 1:
            return found[0]
    return None


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
    """Shapes of all parameters in torch's order, and rows of them.

    Of each layer a weight comes before its bias, and axes are (out, in, height, width): there they
    are (height, width, in, out), and (in, out) of the dense layer.
    """
    parts: dict[str, Tensor] = {}
    columns = ("varname", "start_idx", "end_idx", "shape")
    for row in _columns(folder, "layout.csv", columns):
        name = row["varname"].removesuffix(":0")
        try:
            shape = tuple(literal_eval(row["shape"]))
            part = rows[:, int(row["start_idx"]) : int(row["end_idx"])].unflatten(1, shape)
        except (ValueError, SyntaxError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"small zoo '{folder}', layout.csv, '{name}': expected a place in rows of "
                f"{rows.shape[1]} and its shape, found: {error}"
            ) from error
        axes = {4: (0, 4, 3, 1, 2), 2: (0, 2, 1), 1: (0, 1)}.get(len(shape))
        if axes is None or not name.endswith(("kernel", "bias")):
            raise ValueError(
                f"small zoo '{folder}', layout.csv: expected kernels and biases, found '{name}' "
                f"of shape {shape}"
            )
        parts[name] = part.permute(axes)
    layers = dict.fromkeys(name.rpartition("/")[0] for name in parts)
    try:
        ordered = [parts[f"{layer}/{kind}"] for layer in layers for kind in ("kernel", "bias")]
    except KeyError as error:
        raise ValueError(
            f"small zoo '{folder}', layout.csv: expected a kernel and a bias for each layer, found "
            f"no {error}"
        ) from error
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
