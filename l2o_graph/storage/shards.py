"""Sets of networks as sharded safetensors: each file whole or not at all, and checked when read.

A ``kind`` is "INRs" or "CNNs", as headers and errors call what is in a set.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from l2o_graph.storage.files import expecting, write_atomically

SPLITS = ("train", "val", "test")
VERSION = 1
NAMED = 10  # of many faults, an error names this many

T = TypeVar("T")


def check_split(split: str) -> None:
    """Refuse what is not one of ``SPLITS``, by a ValueError."""
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}', expected one of {list(SPLITS)}")


def shard_name(split: str, number: int) -> str:
    """File of a shard, counted from 0."""
    return f"{split}-{number:05d}.safetensors"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any], kind: str
) -> None:
    """Write a shard, with a record of how it came about; the same content gives the same bytes."""
    content = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    # One entry: safetensors would write several in any order.
    header = {"record": json.dumps({"format": f"l2o_graph {kind}", "version": VERSION, **record})}
    write_atomically(path, save(content, header))


def read_record(path: Path, kind: str) -> dict[str, Any]:
    """The record of a shard, whose tensors are there in full but not read.

    Raises:
        ValueError: For a file that is damaged or something else.
    """
    with expecting(f"{kind} '{path}': expected a whole safetensors file"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        record = dict(json.loads(metadata.get("record", "{}")))
    if (record.get("format"), record.get("version")) != (f"l2o_graph {kind}", VERSION):
        raise ValueError(
            f"{kind} '{path}': expected format 'l2o_graph {kind}', version {VERSION}, in its "
            f"header, found {record.get('format')!r}, {record.get('version')!r}"
        )
    with expecting(f"{kind} '{path}': expected a number among all shards in its header"):
        return record | {key: int(record[key]) for key in ("shard", "shards")}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a shard; a ValueError for a file that is damaged."""
    with expecting(f"'{path}': expected a whole safetensors file"):
        return load_file(path)


def read_set(
    folder: Path, split: str, kind: str, read: Callable[[Path], tuple[dict[str, Any], T]]
) -> tuple[dict[str, Any], list[T], list[str]]:
    """The shards of a split that can be read.

    ``read`` gives the record, with "shard" and "shards", and the content of one.

    Returns:
        The record of the first, empty where there is none; what each holds, in order; and, in
        words, which are missing or damaged.

    Raises:
        ValueError: For shards of another set than the rest.
    """
    found, faults = {}, []
    for path in sorted(folder.glob(f"{split}-*.safetensors")):
        try:
            found[path.name] = read(path)
        except ValueError as error:
            faults.append(str(error))
    if not found:
        return {}, [], faults
    first, contents = next(iter(found.values()))[0], []
    for number in range(first["shards"]):
        name = shard_name(split, number)
        if name in found:
            record, content = found[name]
            if difference := differences({**first, "shard": number}, record):
                raise ValueError(f"{kind} '{folder / name}': of another set: {difference}")
            contents.append(content)
        elif not (folder / name).exists():
            faults.append(f"{name} is missing")
    return first, contents, faults


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Where two records differ, in words; the version of torch may."""
    return ", ".join(
        f"{key} is {found.get(key)}, not {expected[key]}"
        for key in expected
        if key != "torch" and found.get(key) != expected[key]
    )


def named(faults: Sequence[str]) -> str:
    """The first of many."""
    more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    return ", ".join(faults[:NAMED]) + more
