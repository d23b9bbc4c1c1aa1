"""Registration of extensions by name."""

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
    """Create a decorator that registers an object and returns it unchanged.

    Args:
        known: Dictionary to add to.
        name: Name of the entry.
        what: Kind of object, for errors.
        made: Function from the decorated object to the entry; the identity by default.
        taken: Further names that are taken.

    Raises:
        ValueError: For a name that is known or taken, when an object is decorated.
    """

    def add(thing: T) -> T:
        if name in known or name in taken:
            raise ValueError(f"there is a {what} '{name}' already")
        known[name] = made(thing)
        return thing

    return add
