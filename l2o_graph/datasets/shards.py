"""What commands that make sets of networks share: what is missing is made, shard by shard."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from tqdm import tqdm

from l2o_graph.datasets.workers import in_parallel
from l2o_graph.storage.shards import Format, unwritten


@runtime_checkable
class Shard(Protocol):
    """One file to be."""

    @property
    def path(self) -> Path:
        """Place of the file."""
        ...

    @property
    def record(self) -> dict[str, Any]:
        """Content of its header."""
        ...

    def __len__(self) -> int:
        """Count what it holds, in units of the progress bar."""
        ...


S = TypeVar("S", bound=Shard)


def missing(shards: Sequence[S], kind: Format) -> list[S]:
    """List the shards that are not there in full.

    Raises:
        ValueError: For shards of another configuration in their place.
    """
    of_path = {shard.path: shard for shard in shards}
    paths = unwritten({path: shard.record for path, shard in of_path.items()}, kind)
    return [of_path[path] for path in paths]


def make(shards: Sequence[S], kind: Format, work: Callable[[S], S], jobs: int, unit: str) -> int:
    """Make the shards that are missing, each written as it is done; the caller holds the folder.

    Args:
        shards: All of the set.
        kind: Format of the files.
        work: Maker of a shard; a function that can be pickled.
        jobs: Number of processes, of one thread each.
        unit: Name of what a shard holds several of.

    Returns:
        How many of these were made.

    Raises:
        ValueError: For shards of another configuration in their place.
    """
    left = missing(shards, kind)
    total, todo = (sum(map(len, group)) for group in (shards, left))
    with tqdm(total=total, initial=total - todo, unit=unit, smoothing=0) as progress:
        for shard in in_parallel(work, left, jobs):
            progress.update(len(shard))
    return todo


def generator_of(name: str) -> torch.Generator:
    """Random numbers for what has a name, whatever else is made."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)
