"""Splits of published datasets of networks, from their JSON files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2o_graph.storage.files import expecting
from l2o_graph.storage.shards import named


def listed(
    folder: Path, given: str | Path | None, names: Sequence[str], split: str, columns: Sequence[str]
) -> list[tuple[Any, ...]] | None:
    """Read the rows (path, ...) of a split from a JSON file; None if there is no such file.

    Paths in the file are those of the authors' machine. Each is replaced by its longest suffix that
    exists in the folder.

    Args:
        folder: Folder of the dataset.
        given: JSON file; None for the first one of the default names, in the folder or its parent.
        names: Default names.
        split: Key of the split in the file.
        columns: Keys of the lists of a split, "path" first. A split may also be a list of paths;
            the other columns are then None.

    Raises:
        ValueError: For a file of another format, and paths that do not exist.
    """
    candidates = [place / name for place in (folder, folder.parent) for name in names]
    file = next((p for p in candidates if p.exists()), None) if given is None else Path(given)
    if file is None:
        return None
    with expecting(f"splits '{file}': expected lists {list(columns)} for '{split}'", passing=()):
        content = json.loads(file.read_text())[split]
        if isinstance(content, list):
            content = dict.fromkeys(columns, [None] * len(content)) | {columns[0]: content}
        entries = list(zip(*(content[column] for column in columns), strict=True))
        found = [_found(folder, Path(entry[0])) for entry in entries]
    missing = [entry[0] for entry, path in zip(entries, found, strict=True) if path is None]
    if missing or not entries:
        raise ValueError(
            f"'{folder}': expected {len(entries)} files of split '{split}' in '{file.name}', "
            f"{len(missing)} are missing: {named(missing)}"
        )
    return [(path, *entry[1:]) for path, entry in zip(found, entries, strict=True)]


def _found(folder: Path, path: Path) -> Path | None:
    """Find the longest suffix of a path that is a file in the folder."""
    parts = path.relative_to(path.anchor).parts
    suffixes = (folder.joinpath(*parts[i:]) for i in range(len(parts)))
    return next((suffix for suffix in suffixes if suffix.is_file()), None)
