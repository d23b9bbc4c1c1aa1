"""Sets of CNNs in sharded safetensors files, with atomic writes; damaged files are skipped."""

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
TENSORS = ("step", "accuracy", "values")  # tensors of a run, stored as NAME.NUMBER

# Of every 20 runs, 12 for training, 3 for validation, 5 for the test. Three runs have all splits.
SPLIT_OF_RUN = tuple({"t": "train", "v": "val", "s": "test"}[x] for x in "tsvttsttvtsttstvttst")


@dataclass(frozen=True, slots=True)
class Run:
    """Training run of a network, with C checkpoints of P parameters."""

    number: int  # index of the run in its zoo, from 0
    architecture: CNNArchitecture
    hyperparameters: Mapping[str, Any]  # training hyperparameters, as a JSON object
    step: Int64[Tensor, " C"]  # number of training steps
    accuracy: Float[Tensor, " C"]  # test accuracy, from 0 to 1
    values: Float[Tensor, "C P"]  # flattened parameters


@dataclass(frozen=True, slots=True)
class CNNs:
    """Networks with their test accuracies.

    Attributes:
        architectures: Distinct architectures.
        which: Index of each network's architecture among these, (I,).
        values: Flattened parameters of each network, (P,), float32.
        accuracy: Test accuracy of each network, from 0 to 1, (I,).
        run: Number of each network's training run, (I,); a network is a checkpoint of a run.
        step: Number of training steps of each network, (I,).
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
        """Return the architecture of network i."""
        return self.architectures[int(self.which[i])]

    def parameters(self, i: int) -> list[Tensor]:
        """Return views of network i's parameters, in their shapes."""
        return unflattened(self.values[i], self.architecture(i))


def unflattened(
    values: Float[Tensor, "*B _"], architecture: CNNArchitecture
) -> list[Float[Tensor, "..."]]:
    """Split flattened parameters (*batch, P) into views (*batch, *shape)."""
    shapes = architecture.shapes
    parts = values.split([math.prod(shape) for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def run_of(
    number: int,
    architecture: CNNArchitecture,
    hyperparameters: Mapping[str, Any],
    kept: Sequence[tuple[int, float, Float[Tensor, " P"]]],
) -> Run:
    """Build a run from the step, accuracy and parameters of each checkpoint.

    Checkpoints with non-finite parameters are left out.
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
    """Return the split of a run by its number; it does not depend on the size of the zoo."""
    return SPLIT_OF_RUN[run % len(SPLIT_OF_RUN)]


def load_cnns(folder: str | Path, split: str) -> CNNs:
    """Load a zoo that ``python -m l2o_graph.datasets.zoo --out FOLDER`` wrote.

    A warning names shards that are missing or damaged; the others are loaded.

    Args:
        folder: Folder of the shards.
        split: "train", "val" or "test". All checkpoints of a run are in the same split.

    Returns:
        Networks of the split, one for each checkpoint, on the CPU.

    Raises:
        ValueError: For an unknown split, a split without networks, and shards of different zoos.
    """
    check_split(split)
    folder = Path(folder)
    record, shards, faults = read_set(folder, split, KIND, read_shard)
    runs = [run for shard in shards for run in shard]
    if not any(len(run.step) for run in runs):
        reason = "train them by python -m l2o_graph.datasets.zoo, with --runs 3 or more"
        if shards or faults:
            reason = named(faults) if faults else "every run diverged"
        raise ValueError(
            f"CNNs '{folder}': expected networks of split '{split}', in {shard_name(split, 0)} and "
            f"so on, found none: {reason}"
        )
    if faults:
        warnings.warn(
            f"CNNs '{folder}', split '{split}': {len(faults)} of {record['shards']} shards cannot "
            f"be read and are left out: {named(faults)}; run the same command again to train them",
            stacklevel=2,
        )
    return gathered(runs)


def chosen(networks: CNNs, index: Int64[Tensor, " n"]) -> CNNs:
    """Select networks by index.

    Args:
        networks: Networks to select from.
        index: Indices of the selected networks, (n,).

    Returns:
        The n networks, in the order of the indices.
    """
    tensors = {k: getattr(networks, k)[index] for k in ("which", "accuracy", "run", "step")}
    values = tuple(networks.values[i] for i in index.tolist())
    return replace(networks, values=values, **tensors)


def gathered(runs: Sequence[Run]) -> CNNs:
    """Concatenate the checkpoints of runs."""
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
    """Write runs to a file; equal content gives equal bytes.

    ``record`` is a JSON object that describes the zoo, with entries "split", "shard" and "shards".
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
    """Read the record of a shard, without its runs, and the runs.

    Raises:
        ValueError: For a damaged file or one of another format, tensors that do not fit the
            architectures in the record, and weights that are not finite.
    """
    record, tensors, runs = read_record(path, KIND), read_tensors(path), []
    with expecting(f"CNNs '{path}': expected a split and runs in its header"):
        record["split"] = str(record["split"])
        for entry in record.pop("runs"):
            number = int(entry["run"])
            architecture = CNNArchitecture.from_json(entry["architecture"])
            own = [tensors[f"{name}.{number}"] for name in TENSORS]
            _check(number, architecture, *own)
            runs.append(Run(number, architecture, dict(entry["hyperparameters"]), *own))
    return record, runs


def _check(
    number: int, architecture: CNNArchitecture, step: Tensor, accuracy: Tensor, values: Tensor
) -> None:
    """Raise for tensors of wrong shapes or values."""
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
    """Write manifest.json, a readable list of the content of all shards, with a line per run."""
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
    write_atomically(folder / "manifest.json", f'{head[:-1]}, "runs": [\n{of_all}\n]}}\n'.encode())


def stacked(networks: CNNs, index: Int64[Tensor, " n"], like: Tensor) -> list[Tensor]:
    """Stack parameters of networks of one architecture, (n, *shape) each.

    They have the dtype and device of ``like``.
    """
    rows = torch.stack([networks.values[i] for i in index.tolist()]).to(like)
    return unflattened(rows, networks.architecture(int(index[0])))
