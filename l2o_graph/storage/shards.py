"""Datasets of networks as shards in safetensors files: written atomically, checked on reading.

``kind`` is "INRs" or "CNNs": the kind of network in a dataset, for headers and errors.
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
NAMED = 10  # largest number of faults that an error lists

T = TypeVar("T")


def check_split(split: str) -> None:
    """Raise a ValueError for a split that is not one of ``SPLITS``."""
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}', expected one of {list(SPLITS)}")


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard, counted from 0."""
    return f"{split}-{number:05d}.safetensors"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any], kind: str
) -> None:
    """Write a shard with a record of its provenance; equal content gives equal bytes."""
    content = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    # A single entry, because safetensors does not fix the order of several.
    header = {"record": json.dumps({"format": f"l2o_graph {kind}", "version": VERSION, **record})}
    write_atomically(path, save(content, header))


def read_record(path: Path, kind: str) -> dict[str, Any]:
    """Return the record of a shard, without reading its tensors.

    Raises:
        ValueError: For a damaged file or another format.
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
    with expecting(f"{kind} '{path}': expected its index and the number of shards in its header"):
        return record | {key: int(record[key]) for key in ("shard", "shards")}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a shard; raise a ValueError for a damaged file."""
    with expecting(f"'{path}': expected a whole safetensors file"):
        return load_file(path)


def read_set(
    folder: Path, split: str, kind: str, read: Callable[[Path], tuple[dict[str, Any], T]]
) -> tuple[dict[str, Any], list[T], list[str]]:
    """Read all readable shards of a split.

    Args:
        folder: Folder of the dataset.
        split: Name of the split.
        kind: Kind of network.
        read: Function that returns the record of a shard, with "shard" and "shards", and its
            content.

    Returns:
        The record of the first shard, {} if there are none; the contents, in the order of the
        shards; and a description of each shard that is missing or damaged.

    Raises:
        ValueError: For a shard of another dataset.
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
    """Describe the differences of two records, except for the version of torch."""
    return ", ".join(
        f"{key} is {found.get(key)}, not {expected[key]}"
        for key in expected
        if key != "torch" and found.get(key) != expected[key]
    )


def named(faults: Sequence[str]) -> str:
    """List the first ``NAMED`` faults and the number of the others."""
    more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    return ", ".join(faults[:NAMED]) + more
