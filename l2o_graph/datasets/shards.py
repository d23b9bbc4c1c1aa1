"""Creation of sharded sets of networks: shards that are missing are made in parallel."""

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
    """File of a set."""

    path: Path
    numbers: Sequence[int]  # numbers of its networks or runs
    record: dict[str, Any]  # header
    total: str  # entry of the header with the size of the set, if the set can grow; otherwise ""


def shards_of(
    folder: Path, numbers: Sequence[int], size: int, record: dict[str, Any], total: str
) -> list[Shard]:
    """Divide the numbers of a split into shards of a size; for other arguments see ``Shard``."""
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    paths = [folder / shard_name(record["split"], i) for i in range(len(parts))]
    return [
        Shard(path, part, {**record, "shards": len(parts), "shard": i}, total)
        for i, (path, part) in enumerate(zip(paths, parts, strict=True))
    ]


def make(
    shards: Sequence[Shard],
    kind: str,
    count: Callable[[Path], int],
    work: Callable[[Shard], Shard],
    jobs: int,
    unit: str,
) -> int:
    """Make the shards that are missing or damaged.

    Full shards of a smaller set are kept. The caller holds the lock of the folder.

    Args:
        shards: All shards of the set.
        kind: Kind of networks, "INRs" or "CNNs".
        count: Function that counts the networks or runs in a file.
        work: Function that makes and writes a shard; has to be picklable.
        jobs: Number of processes, with one thread each.
        unit: Unit of the progress bar.

    Returns:
        Number of networks or runs that were made.

    Raises:
        ValueError: For existing shards of another configuration, before any work.
    """
    absent, smaller = [], []
    for shard in shards:
        try:
            found = read_record(shard.path, kind)
        except (FileNotFoundError, ValueError):  # missing or damaged
            absent.append(shard)
            continue
        grown = 0 < found.get(shard.total, 0) < shard.record.get(shard.total, 0)
        ignored = {key: shard.record[key] for key in (shard.total, "shards")} if grown else {}
        if difference := differences(shard.record, {**found, **ignored}):
            raise ValueError(
                f"'{shard.path}' is of another configuration: {difference}; choose another --out"
            )
        if grown and count(shard.path) == len(shard.numbers):
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
    """Create a generator that is seeded by a hash of the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)


def quantiles(values: Tensor) -> str:
    """Format minimum, 5 %, 25 %, median, 75 %, 95 % and maximum as cells of a table."""
    found = values.double().quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return "".join(f"{q:8.2f}" for q in found.tolist())
