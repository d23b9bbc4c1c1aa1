"""Checkpoint files: atomic writes, lookup by name or path, and safetensors with a header."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

SUFFIX = ".safetensors"
# In bytes. Headers take some kilobytes; a damaged length field could ask for gigabytes.
LONGEST_HEADER = 10_000_000
LONGEST_REASON = 300  # in characters, of a cause that an error quotes
# Name of a file that write_atomically has not completed.
PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.partial")


@contextmanager
def expecting(what: str, passing: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Turn errors inside the block into a ValueError that names the file and its expected content.

    Args:
        what: Start of the message, such as "'runs/one/state.safetensors': expected the state of a
            run".
        passing: Types of errors that pass unchanged; by default those of a missing file, whose
            message names it already.

    Raises:
        ValueError: For any other error inside the block.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        found = " ".join(repr(error).split())[:LONGEST_REASON]
        raise ValueError(f"{what}, found: {found}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file in the same folder, then rename it: readers never see a partial file.

    Partial copies that a killed process left behind are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_partial(path.parent, path.name)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def clear_partial(folder: Path, name: str | None = None) -> None:
    """Remove partial files of processes that have ended: of the file ``name``, or of any."""
    for path in folder.iterdir():
        match = PARTIAL.fullmatch(path.name)
        if match and name in (None, match["name"]) and not _is_running(int(match["process"])):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Return whether another process has this ID; assumed where the system does not tell."""
    if process == os.getpid():
        return False
    if os.name != "posix":  # os.kill would end the process there
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def packaged(folder: str = "") -> dict[str, Callable[[], bytes]]:
    """Return functions that read the packaged checkpoints of a folder of ``zoo``, by name."""
    place = resources.files("l2o_graph.zoo") / folder
    files = place.iterdir() if place.is_dir() else ()
    return {f.name.removesuffix(SUFFIX): f.read_bytes for f in files if f.name.endswith(SUFFIX)}


def find(
    checkpoint: str | Path, known: Mapping[str, Callable[[], bytes]]
) -> tuple[bytes, str, str]:
    """Read a checkpoint, given by path or by the name of a packaged one, as from ``packaged``.

    Returns:
        Its content, its name, and its name or path for error messages.

    Raises:
        ValueError: For an unknown name.
        FileNotFoundError: For a path without a file.
    """
    name, path = str(checkpoint), Path(checkpoint)
    if name in known:
        return known[name](), name, name
    if path.is_file():
        return path.read_bytes(), path.stem, str(path)
    if isinstance(checkpoint, Path) or path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"checkpoint '{path}': expected a file, found none")
    raise ValueError(
        f"unknown checkpoint '{name}', expected one of {sorted(known)} or a path to a file"
    )


def parse(
    content: bytes, origin: str, expected: str, what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file of the ``expected`` format.

    In errors, ``origin`` is the name of the file, and ``what`` a description of the format, such as
    "a controller".

    Raises:
        ValueError: For a damaged file or another format.
    """
    metadata = header(content, origin)
    with expecting(f"checkpoint '{origin}': expected a whole safetensors file"):
        tensors = load(content)
    if metadata.get("format") != expected:
        raise ValueError(
            f"checkpoint '{origin}': expected format '{expected}' in its header, found "
            f"{metadata.get('format')!r}: not {what}"
        )
    return tensors, metadata


def header(content: bytes, origin: str) -> dict[str, str]:
    """Return the metadata of a safetensors file without reading its tensors.

    Raises:
        ValueError: For a damaged file.
    """
    # A safetensors file starts with the length of its JSON header, 8 bytes, little-endian.
    length = int.from_bytes(content[:8], "little")
    with expecting(f"checkpoint '{origin}': expected a whole safetensors file"):
        if not 2 <= length <= min(len(content) - 8, LONGEST_HEADER):
            raise ValueError(f"{len(content)} bytes with a header of {length}")
        found = json.loads(content[8 : 8 + length])
        return dict(found.get("__metadata__") or {})


def check_writable(folder: Path) -> None:
    """Create a folder if it does not exist; raise an OSError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"out: cannot write to folder '{folder}' ({error.strerror})") from error
