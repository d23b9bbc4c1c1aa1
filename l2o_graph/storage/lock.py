"""Exclusive lock of a folder that a run writes to."""

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
# Errors of file systems that do not support locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
LONGEST_COMMAND = 200  # in characters, of a command line that an error quotes


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder while a run writes to it; the folder is created if it does not exist.

    The operating system releases the lock when the process ends, even if it is killed. Partial
    files of killed runs are removed.

    Raises:
        BlockingIOError: If another run holds the lock; the message names it.
        OSError: If the folder is not writable.
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
        # Removed before the lock is released: a process that opened this file in between notices
        # that the path no longer refers to it.
        with suppress(OSError):
            path.unlink()
        file.close()


def _locked(folder: Path) -> tuple[Path, IO[str]]:
    """Open and lock the lock file of a folder, or one in the temporary folder as a fallback."""
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
            file.close()  # its holder removed it in between
    raise AssertionError("the last place was locked or raised")


def _lock(file: IO[str]) -> None:
    """Lock an open file; raise a BlockingIOError if another process holds its lock."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    file.seek(1 << 30)  # behind the text: Windows makes locked bytes unreadable
    try:
        # Type checkers on other systems know neither name.
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except PermissionError as error:
        raise BlockingIOError(str(error)) from error


def _this_process() -> str:
    """Describe this process, as the holder of a lock, for errors in others."""
    command = textwrap.shorten(shlex.join(sys.orig_argv), LONGEST_COMMAND, placeholder="...")
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})"
