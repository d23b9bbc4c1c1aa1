"""What commands that make sets of networks share: what is missing is made, shard by shard."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from l2o_graph.datasets.workers import in_parallel
from l2o_graph.storage.shards import (
    differences,
    read_record,
    read_tensors,
    shard_name,
    write_tensors,
)

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be."""

    path: Path
    numbers: Sequence[int]  # of the networks, or runs, in it
    record: dict[str, Any]  # what its header says
    # The entry of the header that is smaller in a smaller set with the same numbers; "" where a
    # smaller set has others.
    total: str


def shards_of(
    folder: Path, numbers: Sequence[int], size: int, record: dict[str, Any], total: str
) -> list[Shard]:
    """The shards of a split, of so many numbers each; the other arguments as of ``Shard``."""
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return [
        Shard(
            folder / shard_name(record["split"], i),
            part,
            {**record, "shards": len(parts), "shard": i},
            total,
        )
        for i, part in enumerate(parts)
    ]


def make(
    shards: Sequence[Shard],
    kind: str,
    held: Callable[[Path], int],
    work: Callable[[Shard], Shard],
    jobs: int,
    unit: str,
) -> int:
    """Make the shards that are missing, each written as it is done; count what was made.

    The caller holds the folder. A set that was smaller grows: what it has is not made again.

    Args:
        shards: All of the set.
        kind: Kind of networks.
        held: Count of what is in a file there, as ``numbers`` counts it.
        work: Maker of a shard; a function that can be pickled.
        jobs: Number of processes, of one thread each.
        unit: Name of what is counted: networks, or runs.

    Raises:
        ValueError: For shards of another configuration in their place, before any work.
    """
    absent, smaller = [], []
    for shard in shards:
        try:
            found = read_record(shard.path, kind)
        except (FileNotFoundError, ValueError):  # what is damaged is made anew
            absent.append(shard)
            continue
        grown = 0 < found.get(shard.total, 0) < shard.record.get(shard.total, 0)
        usual = {key: shard.record[key] for key in (shard.total, "shards")} if grown else {}
        if difference := differences(shard.record, {**found, **usual}):
            raise ValueError(
                f"'{shard.path}' is of another configuration: {difference}; give another --out"
            )
        if grown and held(shard.path) == len(shard.numbers):
            smaller.append((shard.path, {**found, **shard.record}))
        elif grown:
            absent.append(shard)
    for path, record in smaller:
        write_tensors(path, read_tensors(path), record, kind)
    total, todo = (sum(len(shard.numbers) for shard in group) for group in (shards, absent))
    with tqdm(total=total, initial=total - todo, unit=unit, smoothing=0) as progress:
        for shard in in_parallel(work, absent, jobs):
            progress.update(len(shard.numbers))
    return todo


def generator_of(name: str) -> torch.Generator:
    """Random numbers for what has a name, whatever else is made."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)


def quantiles(values: Tensor) -> str:
    """Cells of a table: the least, 5 %, 25 %, the median, 75 %, 95 % and the most."""
    found = values.double().quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return "".join(f"{q:8.2f}" for q in found.tolist())
