"""Common part of commands: run, then print lines, or an error in one line."""

import sys
from collections.abc import Callable, Iterable

ERRORS: tuple[type[Exception], ...] = (ValueError, OSError)


def run_command(
    name: str,
    work: Callable[[], Iterable[str]],
    errors: tuple[type[Exception], ...] = ERRORS,
    stopped: str = "stopped; run the same command again to continue",
) -> int:
    """Run a command and print its results.

    Args:
        name: Name of the command, in front of errors.
        work: Function that runs it and returns texts to print.
        errors: Kinds of errors that are printed in a line, without a traceback.
        stopped: Text after Ctrl-C.

    Returns:
        Exit status: 0 if all is done, 2 for a request that cannot be met, 130 after Ctrl-C.
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
