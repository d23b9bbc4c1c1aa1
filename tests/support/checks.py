"""Checks of types, at their full price only where shapes are written."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jaxtyping


def has_shapes(hint: Any) -> bool:
    """Whether one of jaxtyping's types is anywhere in an annotation."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(has_shapes, hint if isinstance(hint, list) else get_args(hint)))


def only_where_shapes_are(jaxtyped: Callable) -> Callable:
    """Make of jaxtyping's decorator one that leaves what has no shapes to the type checker alone.

    jaxtyping checks arguments twice, and binds them to their names, so that an axis has one length
    in all of a call. Most functions name no axis; to them, this was more than half of their time.
    """

    def checked(function=None, *, typechecker):
        if function is None:
            return functools.partial(checked, typechecker=typechecker)
        if inspect.isclass(function):
            if dataclasses.is_dataclass(function) and "__init__" in vars(function):
                function.__init__ = checked(function.__init__, typechecker=typechecker)
            return function
        try:
            hints = get_type_hints(function, include_extras=True)
        except Exception:  # of names that are not there at run time, which jaxtyping passes over
            return jaxtyped(function, typechecker=typechecker)
        if any(map(has_shapes, hints.values())):
            return jaxtyped(function, typechecker=typechecker)
        return typechecker(function)

    return checked
