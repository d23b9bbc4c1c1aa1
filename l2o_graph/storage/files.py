"""Models as files: safetensors with a header, whole or not at all, found by name or path."""

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
# Headers are some kilobytes; one of hundreds of megabytes would be read for seconds.
LONGEST_HEADER = 10_000_000
LONGEST_REASON = 300
# What write_atomically calls a file until it is whole.
PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.partial")


@contextmanager
def expecting(what: str, passing: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Name the file, and what it was expected to hold, where its content is something else.

    Args:
        what: As "'runs/one/state.safetensors': expected the state of a run".
        passing: Errors that leave the block as they are; by default those of a file that is not
            there, which name it themselves.

    Raises:
        ValueError: For whatever else goes wrong inside of the block.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        found = " ".join(repr(error).split())[:LONGEST_REASON]
        raise ValueError(f"{what}, found: {found}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the file, then rename: a reader never sees half of it.

    What a process that was killed had half written of it is removed.
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
    """Remove what processes that have ended had half written in a folder, of one file or of any."""
    for path in folder.iterdir():
        match = PARTIAL.fullmatch(path.name)
        if match and name in (None, match["name"]) and not _is_running(int(match["process"])):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Whether another process of this number runs; taken for granted where that is not told."""
    if process == os.getpid():
        return False
    if os.name != "posix":  # where os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def packaged(folder: str = "") -> dict[str, Callable[[], bytes]]:
    """Readers of the files in a folder of the zoo, by name."""
    place = resources.files("l2o_graph.zoo") / folder
    files = place.iterdir() if place.is_dir() else ()
    return {f.name.removesuffix(SUFFIX): f.read_bytes for f in files if f.name.endswith(SUFFIX)}


def find(
    checkpoint: str | Path, known: Mapping[str, Callable[[], bytes]]
) -> tuple[bytes, str, str]:
    """Read a file, given by the name of a known one or by path.

    Returns:
        Its content, its name, and where errors are to say that it lies.

    Raises:
        ValueError: For an unknown name.
        FileNotFoundError: For a path to nothing.
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
    """Tensors and header of a file of the ``expected`` format, which is that of ``what``.

    Raises:
        ValueError: For a damaged file and another format.
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
    """Metadata of a file, read without its tensors; a ValueError for a damaged one."""
    # A safetensors file starts with the length of its JSON header, 8 bytes, little-endian.
    length = int.from_bytes(content[:8], "little")
    with expecting(f"checkpoint '{origin}': expected a whole safetensors file"):
        if not 2 <= length <= min(len(content) - 8, LONGEST_HEADER):
            raise ValueError(f"{len(content)} bytes whose header is to have {length}")
        found = json.loads(content[8 : 8 + length])
        return dict(found.get("__metadata__") or {})


def check_writable(folder: Path) -> None:
    """Make a folder, and see that files can be made in it; an OSError where they cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"out: cannot write to folder '{folder}' ({error.strerror})") from error
