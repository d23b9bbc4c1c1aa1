"""Things that users add by a name of their own."""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

T = TypeVar("T")


def registering(
    known: dict[str, Any],
    name: str,
    what: str,
    made: Callable[[Any], Any] = lambda thing: thing,
    taken: Collection[str] = (),
) -> Callable[[T], T]:
    """Make a decorator that adds to what is known, and leaves the decorated thing as it is.

    Args:
        known: Dictionary to add to.
        name: Name to add by.
        what: Kind of thing, for errors.
        made: Function that makes the entry of the decorated thing; the thing itself if not given.
        taken: Further names that are taken.

    Raises:
        ValueError: For a name that is known or taken, once something is decorated.
    """

    def add(thing: T) -> T:
        if name in known or name in taken:
            raise ValueError(f"there is a {what} '{name}' already")
        known[name] = made(thing)
        return thing

    return add
