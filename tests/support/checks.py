"""Checks of types, at their full price only where shapes are written."""

import builtins
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jaxtyping


def has_shapes(hint: Any) -> bool:
    """Whether one of jaxtyping's types is anywhere in an annotation."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(has_shapes, hint if isinstance(hint, list) else get_args(hint)))


def unless_disabled(checked: Callable, function: Callable) -> Callable:
    """One or the other, as jaxtyping is configured at a call."""
    config = jaxtyping.config

    def either(*args, **kwargs):
        __tracebackhide__ = True
        return (function if config.jaxtyping_disable else checked)(*args, **kwargs)

    # Under the name of jaxtyping, whose frames are none of the user's to a warning.
    under = {"__name__": jaxtyping.__name__, "__builtins__": builtins}
    either = types.FunctionType(either.__code__, under, closure=either.__closure__)
    return functools.wraps(function)(either)


def at_less_cost(jaxtyped: Callable) -> Callable:
    """Make of jaxtyping's decorator one that checks the same in less time.

    jaxtyping checks arguments before a call and again with its result, for messages that tell which
    of them was wrong, and binds them to their names, so that an axis has one length in all of a
    call. Here they are checked once, and bound only where an annotation has a shape; most functions
    have none, and spent more than half of their time on this.
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
        shaped = any(map(has_shapes, hints.values()))
        if shaped and inspect.isgeneratorfunction(function):  # which runs inside of other calls
            return jaxtyped(function, typechecker=typechecker)
        once = typechecker(function)
        if shaped:
            once = jaxtyped(once, typechecker=None)
        return unless_disabled(once, function)

    return checked
