"""Conversion of JSON to dataclasses, with checks of types."""

import dataclasses
import math
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

LONGEST_VALUE = 80  # characters of a value in an error


def parsed(kind: Any, value: Any, name: str) -> Any:
    """Convert a JSON value to a type, including values nested in dataclasses, lists and so on.

    Args:
        kind: A dataclass, str, bool, int, float, None, or a union, list or dict of these.
            Numbers have to be finite. Integer keys of a dict are strings in JSON.
        value: Value from JSON.
        name: Name of the value, for the ValueError if it has another type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, name)
    if origin in (Union, UnionType):
        chosen = NoneType if value is None else next(k for k in inner if k is not NoneType)
        if chosen in inner:
            return None if value is None else parsed(chosen, value, name)
    elif origin is list and isinstance(value, list):
        return [parsed(inner[0], each, name) for each in value]
    elif origin is dict and isinstance(value, dict):
        return {_key(inner[0], k, name): parsed(inner[1], v, name) for k, v in value.items()}
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif kind in (str, bool, int) and type(value) is kind:
        return value
    expected = kind.__name__ if isinstance(kind, type) else str(kind)
    raise ValueError(f"{name}: expected {expected}, found {repr(value)[:LONGEST_VALUE]}")


def _record(kind: Any, value: Any, name: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    if not isinstance(value, dict) or not required <= value.keys() <= fields.keys():
        found = sorted(value) if isinstance(value, dict) else repr(value)[:LONGEST_VALUE]
        raise ValueError(f"{name}: expected the fields {list(fields)}, found {found}")
    hints = get_type_hints(kind)
    return kind(**{n: parsed(hints[n], each, n) for n, each in value.items()})


def _key(kind: type, key: str, name: str) -> Any:
    try:
        return kind(key)
    except ValueError:
        raise ValueError(f"{name}: expected keys of type {kind.__name__}, found '{key}'") from None
