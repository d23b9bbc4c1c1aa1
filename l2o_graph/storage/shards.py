"""Sets of networks as sharded safetensors: each file whole or not at all, and checked when read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from l2o_graph.storage.files import expecting, write_atomically

NAMED = 10  # of many faults, an error names this many


@dataclass(frozen=True, slots=True)
class Format:
    """What the shards of a set have in common: what errors and headers call them, and a version."""

    networks: str
    name: str
    version: int


def shard_name(split: str, number: int) -> str:
    """File of a shard, counted from 0."""
    return f"{split}-{number:05d}.safetensors"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any], kind: Format
) -> None:
    """Write a shard, with a record of how it came about; the same content gives the same bytes.

    Raises:
        OSError: For a place that cannot be written to.
    """
    content = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    # One entry: safetensors would write several in any order.
    header = {"record": json.dumps({"format": kind.name, "version": kind.version, **record})}
    write_atomically(path, save(content, header))


def read_record(path: Path, kind: Format) -> dict[str, Any]:
    """The record of a shard, whose tensors are there in full but not read.

    Raises:
        ValueError: For a file that is damaged or something else.
        OSError: For one that cannot be opened.
    """
    with expecting(f"{kind.networks} '{path}': expected a whole safetensors file"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        record = dict(json.loads(metadata.get("record", "{}")))
    if (record.get("format"), record.get("version")) != (kind.name, kind.version):
        raise ValueError(
            f"{kind.networks} '{path}': expected format '{kind.name}', version {kind.version}, in "
            f"its header, found {record.get('format')!r}, {record.get('version')!r}"
        )
    return record


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a shard.

    Raises:
        ValueError: For a file that is damaged.
        OSError: For one that cannot be opened.
    """
    with (
        expecting(f"'{path}': expected a whole safetensors file"),
        safe_open(path, framework="pt") as file,
    ):
        # safe_open has keys() but is not iterable, which the linter cannot know.
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a shard, without the others.

    Raises:
        ValueError: For a file that is damaged or lacks the tensor.
        OSError: For one that cannot be opened.
    """
    with (
        expecting(f"'{path}': expected a tensor '{name}'"),
        safe_open(path, framework="pt") as file,
    ):
        return file.get_tensor(name)


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Where two records differ, in words; the version of torch may."""
    return ", ".join(
        f"{key} is {found.get(key)}, not {expected[key]}"
        for key in expected
        if key != "torch" and found.get(key) != expected[key]
    )


def unwritten(
    expected: Mapping[Path, Mapping[str, Any]], kind: Format, growing: Sequence[str] = ()
) -> tuple[list[Path], list[Path]]:
    """Those shards that are not there in full, and those of a smaller set, each in order.

    Args:
        expected: What the record of each is to say.
        kind: Kind of shards.
        growing: Entries of records that are smaller in a smaller set of the same.

    Raises:
        ValueError: For those of another configuration.
    """
    missing, smaller = [], []
    for path, record in expected.items():
        if not path.exists():
            missing.append(path)
            continue
        try:
            found = read_record(path, kind)
        except ValueError:  # damaged: made anew
            missing.append(path)
            continue
        grown = {key: record[key] for key in growing if 0 < found.get(key, 0) < record[key]}
        if difference := differences(record, {**found, **grown}):
            raise ValueError(
                f"'{path}' is of another configuration: {difference}; give another --out"
            )
        if grown:
            smaller.append(path)
    return missing, smaller


def rewrite_record(path: Path, record: Mapping[str, Any], kind: Format) -> None:
    """Change entries of a shard's record; its tensors stay.

    Raises:
        ValueError: For a file that is damaged or something else.
        OSError: For a place that cannot be written to.
    """
    write_tensors(path, read_tensors(path), {**read_record(path, kind), **record}, kind)


def named(faults: Sequence[str]) -> str:
    """The first of many."""
    more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    return ", ".join(faults[:NAMED]) + more
