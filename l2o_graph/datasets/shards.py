"""What commands that make sets of networks share: what is missing is made, shard by shard."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from tqdm import tqdm

from l2o_graph.datasets.workers import in_parallel
from l2o_graph.storage.shards import Format, rewrite_record, unwritten


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

    @property
    def growing(self) -> tuple[str, ...]:
        """Entries of the header that are smaller in a smaller set of the same networks."""
        ...

    def __len__(self) -> int:
        """Count what it holds, in units of the progress bar."""
        ...

    def held(self) -> int:
        """Count what the file there holds, in the same units."""
        ...


S = TypeVar("S", bound=Shard)


def missing(shards: Sequence[S], kind: Format) -> list[S]:
    """List the shards that are not there in full.

    Raises:
        ValueError: For shards of another configuration in their place.
    """
    return _sorted_out(shards, kind)[0]


def _sorted_out(shards: Sequence[S], kind: Format) -> tuple[list[S], list[S]]:
    """Those that are not there in full, and those that are, but say they are of a smaller set."""
    of_path = {shard.path: shard for shard in shards}
    growing = shards[0].growing if shards else ()
    found = unwritten({path: shard.record for path, shard in of_path.items()}, kind, growing)
    absent, smaller = ([of_path[path] for path in paths] for paths in found)
    whole = [shard for shard in smaller if shard.held() == len(shard)]
    return absent + [shard for shard in smaller if shard not in whole], whole


def make(shards: Sequence[S], kind: Format, work: Callable[[S], S], jobs: int, unit: str) -> int:
    """Make the shards that are missing, each written as it is done; the caller holds the folder.

    A set that was smaller grows: what it has is not made again.

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
    left, grown = _sorted_out(shards, kind)
    for shard in grown:
        rewrite_record(shard.path, shard.record, kind)
    total, todo = (sum(map(len, group)) for group in (shards, left))
    with tqdm(total=total, initial=total - todo, unit=unit, smoothing=0) as progress:
        for shard in in_parallel(work, left, jobs):
            progress.update(len(shard))
    return todo


def generator_of(name: str) -> torch.Generator:
    """Random numbers for what has a name, whatever else is made."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)


def folder_of(
    kind: str, names: Sequence[str], options: Mapping[str, Any], usual: Mapping[str, Any]
) -> Path:
    """Folder of a set whose --out is not given, named by what it is made of and how.

    Args:
        kind: First word.
        names: Further words.
        options: Numbers by name, None for what was not given.
        usual: Numbers that go without saying.

    Returns:
        A path under runs/, as runs/zoo-park-steps600.
    """
    told = [
        f"{name.replace('_', '-')}{value}"
        for name, value in options.items()
        if value is not None and value != usual[name]
    ]
    return Path("runs") / "-".join([kind, *names, *told])
