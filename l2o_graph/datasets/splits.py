"""Splits of sets that others published, from the JSON files that their scripts write."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2o_graph.storage.files import expecting
from l2o_graph.storage.shards import named


def listed(
    folder: Path, given: str | Path | None, usual: Sequence[str], split: str, columns: Sequence[str]
) -> list[tuple[Any, ...]] | None:
    """What a JSON file says that a split is; None where there is no such file.

    Paths in it are as they were on the authors' machine: what counts is the longest end of each
    that is there in the folder.

    Args:
        folder: Folder of the set.
        given: The file; None for the first of the usual names, in the folder or beside it.
        usual: These names.
        split: Its key in the file.
        columns: Keys of the lists of a split, "path" first. A split may also be a list of paths
            alone; the others are then None.

    Raises:
        ValueError: For a file that is something else, and paths to nothing.
    """
    candidates = [place / name for place in (folder, folder.parent) for name in usual]
    file = next((p for p in candidates if p.exists()), None) if given is None else Path(given)
    if file is None:
        return None
    with expecting(f"splits '{file}': expected lists {list(columns)} for '{split}'", passing=()):
        content = json.loads(file.read_text())[split]
        if isinstance(content, list):
            content = dict.fromkeys(columns, [None] * len(content)) | {columns[0]: content}
        entries = list(zip(*(content[column] for column in columns), strict=True))
        places = [_place(folder, Path(entry[0])) for entry in entries]
    missing = [entry[0] for entry, place in zip(entries, places, strict=True) if place is None]
    if missing or not entries:
        raise ValueError(
            f"'{folder}': expected {len(entries)} files of split '{split}' by '{file.name}', "
            f"{len(missing)} are missing: {named(missing)}"
        )
    return [(place, *entry[1:]) for place, entry in zip(places, entries, strict=True)]


def _place(folder: Path, path: Path) -> Path | None:
    parts = path.relative_to(path.anchor).parts
    ends = (folder.joinpath(*parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end.is_file()), None)
