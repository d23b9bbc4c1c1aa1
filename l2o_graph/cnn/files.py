"""Sets of CNNs as sharded safetensors: written whole or not at all, what is whole is read."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from l2o_graph.cnn.architecture import CNNArchitecture
from l2o_graph.zoo.files import expecting, write_atomically
from l2o_graph.zoo.shards import (
    Format,
    differences,
    named,
    read_record,
    read_tensors,
    shard_name,
    write_tensors,
)

FORMAT = Format("CNNs", "l2o_graph CNNs", 1)
SPLITS = ("train", "val", "test")
MANIFEST = "manifest.json"

# Twelve for training, three for validation, five for the test, and mixed: few runs have all three.
SPLIT_OF_RUN = tuple({"t": "train", "v": "val", "s": "test"}[x] for x in "tsvttsttvtsttstvttst")


@dataclass(frozen=True, slots=True)
class Run:
    """A network on its way through training: the checkpoints C that were kept of it.

    Attributes:
        number: Of the run in its zoo, from 0.
        architecture: Of the network.
        hyperparameters: How it was trained, as JSON can hold it.
        step: Training steps done at each checkpoint.
        accuracy: Share of the test images that it got right then, in [0, 1].
        values: Its parameters then, one after another in a row.
    """

    number: int
    architecture: CNNArchitecture
    hyperparameters: Mapping[str, Any]
    step: Int64[Tensor, " C"]
    accuracy: Float[Tensor, " C"]
    values: Float[Tensor, "C P"]


@dataclass(frozen=True, slots=True)
class CNNs:
    """Networks, each with the share of test images that it gets right.

    Attributes:
        architectures: The distinct ones.
        which: Index of each network's architecture.
        values: Parameters of each network, one after another in a row, float32.
        accuracy: On the test images, in [0, 1].
        run: Number of the training run that each network is a checkpoint of.
        step: Training steps done.
    """

    architectures: tuple[CNNArchitecture, ...]
    which: Int64[Tensor, " I"]
    values: tuple[Float[Tensor, " _"], ...]
    accuracy: Float[Tensor, " I"]
    run: Int64[Tensor, " I"]
    step: Int64[Tensor, " I"]

    def __len__(self) -> int:
        return len(self.values)

    def architecture(self, i: int) -> CNNArchitecture:
        """Of network i."""
        return self.architectures[int(self.which[i])]

    def parameters(self, i: int) -> list[Tensor]:
        """Views of network i's parameters, in their shapes."""
        return unflattened(self.values[i], self.architecture(i))


def unflattened(
    values: Float[Tensor, "*B _"], architecture: CNNArchitecture
) -> list[Float[Tensor, "..."]]:
    """Views of rows of parameters in their shapes, behind any batch axes."""
    shapes = architecture.shapes
    parts = values.split([math.prod(shape) for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def split_of(run: int) -> str:
    """To which split the run of a number belongs; the same in a zoo of any size."""
    return SPLIT_OF_RUN[run % len(SPLIT_OF_RUN)]


def check_split(split: str) -> None:
    """Refuse what is not one of ``SPLITS``, by a ValueError."""
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}', expected one of {list(SPLITS)}")


def load_cnns(folder: str | Path, split: str) -> CNNs:
    """Read what ``python -m l2o_graph.datasets.zoo --out FOLDER`` wrote, checkpoint by checkpoint.

    Shards that are missing or damaged are named in a warning; the others are read.

    Args:
        folder: Where the shards lie.
        split: "train", "val" or "test": no run has checkpoints in two of them.

    Raises:
        ValueError: For an unknown split, one without a network to read, and shards of another
            zoo than the rest.
    """
    check_split(split)
    folder = Path(folder)
    records: dict[int, dict[str, Any]] = {}
    faults: list[str] = []
    runs: list[Run] = []
    for path in sorted(folder.glob(f"{split}-*.safetensors")):
        try:
            record, found = read_shard(path)
        except ValueError as error:
            faults.append(str(error))
            continue
        records[record["shard"]] = record
        runs += found
    first = next(iter(records.values()), {"shards": 0})
    for record in records.values():
        if difference := differences(_common(first), _common(record)):
            name = folder / shard_name(split, record["shard"])
            raise ValueError(f"CNNs '{name}': of another zoo than the rest: {difference}")
    there = {path.name for path in folder.glob(f"{split}-*.safetensors")}
    names = [shard_name(split, i) for i in range(first["shards"])]
    faults += [f"{name} is missing" for name in names if name not in there]
    checkpoints = sum(len(run.step) for run in runs)
    if not checkpoints:
        reason = "; python -m l2o_graph.datasets.zoo makes them, of 3 --runs or more in each split"
        if records or faults:
            reason = f": {named(faults)}" if faults else ", as every run diverged"
        raise ValueError(
            f"CNNs '{folder}': expected networks of split '{split}', in {shard_name(split, 0)} and "
            f"on, found none{reason}"
        )
    if faults:
        warnings.warn(
            f"CNNs '{folder}', split '{split}': {len(faults)} of {len(names)} shards cannot be "
            f"read, and are left out: {named(faults)}; the command that trained them trains what "
            "is missing",
            stacklevel=2,
        )
    return gathered(runs)


def chosen(networks: CNNs, index: Int64[Tensor, " n"]) -> CNNs:
    """Some of the networks, in the order of their numbers' list."""
    return replace(
        networks,
        which=networks.which[index],
        values=tuple(networks.values[i] for i in index.tolist()),
        accuracy=networks.accuracy[index],
        run=networks.run[index],
        step=networks.step[index],
    )


def gathered(runs: Sequence[Run]) -> CNNs:
    """All checkpoints of runs, one after another."""
    index = {a: i for i, a in enumerate(dict.fromkeys(run.architecture for run in runs))}
    counts = torch.tensor([len(run.step) for run in runs], dtype=torch.int64)
    which = torch.tensor([index[run.architecture] for run in runs], dtype=torch.int64)
    numbers = torch.tensor([run.number for run in runs], dtype=torch.int64)
    return CNNs(
        architectures=tuple(index),
        which=which.repeat_interleave(counts),
        values=tuple(row for run in runs for row in run.values),
        accuracy=torch.cat([run.accuracy for run in runs]),
        run=numbers.repeat_interleave(counts),
        step=torch.cat([run.step for run in runs]),
    )


def write_shard(path: Path, runs: Sequence[Run], record: Mapping[str, Any]) -> None:
    """Write runs, and a record of how they came about.

    Args:
        path: Where to; the same content gives the same bytes.
        runs: Those of the shard.
        record: Anything that JSON can hold; "split", "shard" and "shards" are read back.

    Raises:
        OSError: For a place that cannot be written to.
    """
    tensors = {
        f"{name}.{run.number}": getattr(run, name)
        for run in runs
        for name in ("step", "accuracy", "values")
    }
    described = [
        {
            "run": run.number,
            "architecture": run.architecture.to_json(),
            "hyperparameters": dict(run.hyperparameters),
        }
        for run in runs
    ]
    write_tensors(path, tensors, {**record, "runs": described}, FORMAT)


def read_shard(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """The record of a shard, and its runs.

    Raises:
        ValueError: For a file that is damaged or something else, tensors that do not make the
            networks of its record, and networks that are not finite.
    """
    record, tensors = read_record(path, FORMAT), read_tensors(path)
    with expecting(f"CNNs '{path}': expected shards and runs as they are written in its header"):
        record |= {"split": str(record["split"])} | {k: int(record[k]) for k in ("shard", "shards")}
        described = [
            (int(run["run"]), CNNArchitecture.from_json(run["architecture"]),
             dict(run["hyperparameters"]))
            for run in record["runs"]
        ]  # fmt: skip
    runs = []
    for number, architecture, hyperparameters in described:
        names = [f"{name}.{number}" for name in ("step", "accuracy", "values")]
        if absent := [name for name in names if name not in tensors]:
            raise ValueError(f"CNNs '{path}', run {number}: expected tensors {names}, no {absent}")
        step, accuracy, values = (tensors[name] for name in names)
        shares = step.dim() == 1 and accuracy.shape == step.shape
        if not (shares and bool(((accuracy >= 0) & (accuracy <= 1)).all())):
            raise ValueError(
                f"CNNs '{path}', run {number}: expected {step.numel()} accuracies from 0 to 1, "
                f"found {accuracy.tolist()}"
            )
        if values.shape != (len(step), architecture.num_parameters):
            raise ValueError(
                f"CNNs '{path}', run {number}: expected {len(step)} rows of "
                f"{architecture.num_parameters} parameters, found {tuple(values.shape)}"
            )
        if not bool(values.isfinite().all()):
            raise ValueError(f"CNNs '{path}', run {number}: expected finite weights, found others")
        runs.append(Run(number, architecture, hyperparameters, step, accuracy, values))
    return record, runs


def write_manifest(folder: Path, paths: Sequence[Path]) -> None:
    """Write manifest.json: what the shards hold, for people, with a line for each run.

    Raises:
        ValueError: For shards that are damaged.
        OSError: For a place that cannot be written to.
    """
    lines, common = [], {}
    for path in paths:
        record, runs = read_shard(path)
        common = _common(record)
        for run in runs:
            line = {
                "run": run.number,
                "split": record["split"],
                "shard": path.name,
                "architecture": run.architecture.to_json(),
                "hyperparameters": run.hyperparameters,
                "step": run.step.tolist(),
                "accuracy": [round(a, 6) for a in run.accuracy.tolist()],
            }
            lines.append((run.number, json.dumps(line)))
    runs_of_all = ",\n".join(line for _, line in sorted(lines))
    head = json.dumps({k: v for k, v in common.items() if k not in ("split", "shards")})
    write_atomically(folder / MANIFEST, f'{head[:-1]}, "runs": [\n{runs_of_all}\n]}}\n'.encode())


def _common(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the records of all shards of a split say alike."""
    return {key: value for key, value in record.items() if key not in ("shard", "runs")}
