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

from l2o_graph.datasets.cnn.architecture import CNNArchitecture
from l2o_graph.storage.files import expecting, write_atomically
from l2o_graph.storage.shards import (
    check_split,
    named,
    read_record,
    read_set,
    read_tensors,
    shard_name,
    write_tensors,
)

KIND = "CNNs"
TENSORS = ("step", "accuracy", "values")  # of a run, each as NAME.NUMBER
MANIFEST = "manifest.json"

# Twelve for training, three for validation, five for the test, and mixed: few runs have all three.
SPLIT_OF_RUN = tuple({"t": "train", "v": "val", "s": "test"}[x] for x in "tsvttsttvtsttstvttst")


@dataclass(frozen=True, slots=True)
class Run:
    """A network on its way through training: the checkpoints C that were kept of it."""

    number: int  # of the run in its zoo, from 0
    architecture: CNNArchitecture
    hyperparameters: Mapping[str, Any]  # how it was trained, as JSON can hold it
    step: Int64[Tensor, " C"]  # training steps done
    accuracy: Float[Tensor, " C"]  # share of the test images that it got right, in [0, 1]
    values: Float[Tensor, "C P"]  # its parameters, one after another in a row


@dataclass(frozen=True, slots=True)
class CNNs:
    """Networks, each with the share of test images that it gets right.

    Attributes:
        architectures: The distinct architectures.
        which: Index of each network's architecture among these, (I,).
        values: Parameters of each network, one after another in a row, float32.
        accuracy: Accuracy of each network on the test images, from 0 to 1.
        run: Number of the training run that each network is a checkpoint of.
        step: Number of training steps done.
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
        """Give the architecture of network i."""
        return self.architectures[int(self.which[i])]

    def parameters(self, i: int) -> list[Tensor]:
        """Give views of network i's parameters, in their shapes."""
        return unflattened(self.values[i], self.architecture(i))


def unflattened(
    values: Float[Tensor, "*B _"], architecture: CNNArchitecture
) -> list[Float[Tensor, "..."]]:
    """Views of rows of parameters in their shapes, behind any batch axes."""
    shapes = architecture.shapes
    parts = values.split([math.prod(shape) for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def run_of(
    number: int,
    architecture: CNNArchitecture,
    hyperparameters: Mapping[str, Any],
    kept: Sequence[tuple[int, float, Float[Tensor, " P"]]],
) -> Run:
    """Put a run together from the step, accuracy and parameters of its checkpoints.

    Those that are not finite are left out.
    """
    finite = [entry for entry in kept if bool(entry[2].isfinite().all())]
    rows = [row[None] for _, _, row in finite]
    return Run(
        number,
        architecture,
        hyperparameters,
        step=torch.tensor([step for step, _, _ in finite], dtype=torch.int64),
        accuracy=torch.tensor([accuracy for _, accuracy, _ in finite], dtype=torch.float32),
        values=torch.cat([torch.empty(0, architecture.num_parameters), *rows]),
    )


def split_of(run: int) -> str:
    """To which split the run of a number belongs; the same in a zoo of any size."""
    return SPLIT_OF_RUN[run % len(SPLIT_OF_RUN)]


def load_cnns(folder: str | Path, split: str) -> CNNs:
    """Read what ``python -m l2o_graph.datasets.zoo --out FOLDER`` wrote, checkpoint by checkpoint.

    Shards that are missing or damaged are named in a warning; the others are read.

    Args:
        folder: Where the shards lie.
        split: "train", "val" or "test": no run has checkpoints in two of them.

    Returns:
        The networks of the split, on the CPU.

    Raises:
        ValueError: For an unknown split, one without a network to read, and shards of another
            zoo than the rest.
    """
    check_split(split)
    folder = Path(folder)
    record, shards, faults = read_set(folder, split, KIND, read_shard)
    runs = [run for shard in shards for run in shard]
    if not any(len(run.step) for run in runs):
        reason = "; python -m l2o_graph.datasets.zoo makes them, of 3 --runs or more in each split"
        if shards or faults:
            reason = f": {named(faults)}" if faults else ", as every run diverged"
        raise ValueError(
            f"CNNs '{folder}': expected networks of split '{split}', in {shard_name(split, 0)} and "
            f"on, found none{reason}"
        )
    if faults:
        warnings.warn(
            f"CNNs '{folder}', split '{split}': {len(faults)} of {record['shards']} shards cannot "
            f"be read, and are left out: {named(faults)}; the command that trained them trains "
            "what is missing",
            stacklevel=2,
        )
    return gathered(runs)


def chosen(networks: CNNs, index: Int64[Tensor, " n"]) -> CNNs:
    """Choose some of the networks.

    Args:
        networks: The networks to choose from.
        index: Numbers of those to keep, (n,), from 0 on.

    Returns:
        n networks, in the order of their numbers.
    """
    tensors = {k: getattr(networks, k)[index] for k in ("which", "accuracy", "run", "step")}
    values = tuple(networks.values[i] for i in index.tolist())
    return replace(networks, values=values, **tensors)


def gathered(runs: Sequence[Run]) -> CNNs:
    """All checkpoints of runs, one after another."""
    index = {a: i for i, a in enumerate(dict.fromkeys(run.architecture for run in runs))}
    return CNNs(
        architectures=tuple(index),
        which=torch.cat([torch.full_like(run.step, index[run.architecture]) for run in runs]),
        values=tuple(row for run in runs for row in run.values),
        accuracy=torch.cat([run.accuracy for run in runs]),
        run=torch.cat([torch.full_like(run.step, run.number) for run in runs]),
        step=torch.cat([run.step for run in runs]),
    )


def write_shard(path: Path, runs: Sequence[Run], record: Mapping[str, Any]) -> None:
    """Write runs, and a record of how they came about; the same content gives the same bytes.

    ``record`` is anything that JSON can hold; "split", "shard" and "shards" are read back.
    """
    tensors = {f"{name}.{run.number}": getattr(run, name) for run in runs for name in TENSORS}
    described = [
        {
            "run": run.number,
            "architecture": run.architecture.to_json(),
            "hyperparameters": dict(run.hyperparameters),
        }
        for run in runs
    ]
    write_tensors(path, tensors, {**record, "runs": described}, KIND)


def read_shard(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """What the record of a shard says, but of its runs; and these.

    Raises:
        ValueError: For a file that is damaged or something else, tensors that do not make the
            networks of its record, and networks that are not finite.
    """
    record, tensors, runs = read_record(path, KIND), read_tensors(path), []
    with expecting(f"CNNs '{path}': expected a split and runs as they are written here"):
        record["split"] = str(record["split"])
        for told in record.pop("runs"):
            number, architecture = int(told["run"]), CNNArchitecture.from_json(told["architecture"])
            own = [tensors[f"{name}.{number}"] for name in TENSORS]
            _check(number, architecture, *own)
            runs.append(Run(number, architecture, dict(told["hyperparameters"]), *own))
    return record, runs


def _check(
    number: int, architecture: CNNArchitecture, step: Tensor, accuracy: Tensor, values: Tensor
) -> None:
    """Refuse tensors that are not of checkpoints of a network, and not finite."""
    (count,) = step.shape
    shape = (count, architecture.num_parameters)
    if accuracy.shape != (count,) or values.shape != shape:
        raise ValueError(
            f"run {number}: expected {count} accuracies and parameters {shape}, found "
            f"{tuple(accuracy.shape)} and {tuple(values.shape)}"
        )
    if not bool(((accuracy >= 0) & (accuracy <= 1)).all()):
        raise ValueError(f"run {number}: expected accuracies from 0 to 1")
    if not bool(values.isfinite().all()):
        raise ValueError(f"run {number}: expected finite weights, found others")


def write_manifest(folder: Path, paths: Sequence[Path]) -> None:
    """Write manifest.json: what the shards hold, for people, with a line for each run.

    Raises:
        ValueError: For shards that are damaged.
    """
    lines, common = {}, {}
    for path in paths:
        common, runs = read_shard(path)
        for run in runs:
            line = {
                "run": run.number,
                "split": common["split"],
                "shard": path.name,
                "architecture": run.architecture.to_json(),
                "hyperparameters": run.hyperparameters,
                "step": run.step.tolist(),
                "accuracy": [round(a, 6) for a in run.accuracy.tolist()],
            }
            lines[run.number] = json.dumps(line)
    head = json.dumps({k: v for k, v in common.items() if k not in ("split", "shard", "shards")})
    of_all = ",\n".join(lines[number] for number in sorted(lines))
    write_atomically(folder / MANIFEST, f'{head[:-1]}, "runs": [\n{of_all}\n]}}\n'.encode())


def stacked(networks: CNNs, index: Int64[Tensor, " n"], like: Tensor) -> list[Tensor]:
    """Parameters of networks of one architecture, (n, *shape) each, in the type of ``like``."""
    rows = torch.stack([networks.values[i] for i in index.tolist()]).to(like)
    return unflattened(rows, networks.architecture(int(index[0])))
