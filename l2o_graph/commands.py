"""What commands do alike: work, then print lines, or say in one line why not."""

import sys
from collections.abc import Callable, Iterable

ERRORS: tuple[type[Exception], ...] = (ValueError, OSError)


def run_command(
    name: str,
    work: Callable[[], Iterable[str]],
    errors: tuple[type[Exception], ...] = ERRORS,
    stopped: str = "stopped; the same command goes on",
) -> int:
    """Do the work of a command and print what comes of it.

    Args:
        name: Name of the command, in front of errors.
        work: Function that does it and answers with texts to print.
        errors: Kinds of errors that are told in a line, not in a traceback.
        stopped: Text after Ctrl-C.

    Returns:
        The exit status: 0 when all is done, 2 for a request that cannot be met, 130 after Ctrl-C.
    """
    try:
        texts = work()
    except errors as error:
        print(f"{name}: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    for text in texts:
        print(text)
    return 0
