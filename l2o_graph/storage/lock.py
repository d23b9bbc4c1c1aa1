"""A folder that one run at a time writes to."""

import errno
import hashlib
import os
import shlex
import socket
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from l2o_graph.storage.files import check_writable, clear_partial

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

LOCK = ".lock"
# What file systems answer that know no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
LONGEST_COMMAND = 200


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is not there, while a run writes to it.

    The lock is the operating system's: it ends with the process, however that ends, and nothing
    has to be cleared away after a kill. What killed runs had half written is removed.

    Raises:
        BlockingIOError: Where another run holds it, saying which.
        OSError: Where it cannot be written to.
    """
    check_writable(folder)
    path, file = _locked(folder)
    try:
        file.truncate(0)
        file.write(_this_process())
        file.flush()
        clear_partial(folder)
        yield
    finally:
        # Removed while it is still locked: who has opened it meanwhile finds another one there.
        with suppress(OSError):
            path.unlink()
        file.close()


def _locked(folder: Path) -> tuple[Path, IO[str]]:
    """The lock of a folder, in it or, on a file system that knows none, among temporary files."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    places = folder / LOCK, Path(tempfile.gettempdir()) / f"l2o_graph-{name}{LOCK}"
    for path in places:
        while True:
            file = path.open("a+", encoding="utf-8", errors="replace")
            try:
                _lock(file)
                with suppress(FileNotFoundError):
                    if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                        return path, file
            except BlockingIOError:
                file.seek(0)
                holder = file.read() or "another process"
                file.close()
                raise BlockingIOError(
                    f"folder '{folder}' is in use by {holder}; wait for it, stop it, or choose "
                    "another folder"
                ) from None
            except OSError as error:
                file.close()
                if error.errno not in NO_LOCKS or path == places[-1]:
                    raise
                break
            file.close()  # its holder has ended and removed it in between
    raise AssertionError("the last place has answered or raised")


def _lock(file: IO[str]) -> None:
    """Take the lock of an open file; BlockingIOError where another has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    file.seek(1 << 30)  # far behind the text, which Windows would not let others read
    try:
        # A type checker on another system knows neither name.
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except PermissionError as error:
        raise BlockingIOError(str(error)) from error


def _this_process() -> str:
    """Who holds a lock, for the error that others get."""
    command = textwrap.shorten(shlex.join(sys.orig_argv), LONGEST_COMMAND, placeholder="...")
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})"
