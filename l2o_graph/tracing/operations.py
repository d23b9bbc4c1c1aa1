"""Registry of rules for operators, and functions that the rules share."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

from l2o_graph.tracing.labels import Label

Operation = Callable[..., Label | None]
Rule = TypeVar("Rule", bound=Operation)
OPERATIONS: dict[str, Operation] = {}
ALONG_AXES: set[str] = set()


def operation(*names: str, axes: bool = False) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators: (trace, out, *args, **kwargs) -> label of out.

    A rule returns None for an output without neurons, and raises NotFollowed if the operation
    cannot be followed.

    Args:
        names: Names of the ATen operators.
        axes: Whether the rule is called with the axes that the operator works along instead of the
            arguments after the first.
    """

    def add(rule: Rule) -> Rule:
        OPERATIONS.update(dict.fromkeys(names, rule))
        if axes:
            ALONG_AXES.update(names)
        return rule

    return add


def dims_of(x: Tensor, dims: Any) -> list[int]:
    """Return the axes that ``dim`` of an operator selects; None or [] selects all."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(x.dim()))
    return [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)] if x.dim() else []


def is_data(label: Label, axes: Iterable[int]) -> bool:
    """Return whether some axes are free of neurons."""
    return all(f.set is None for axis in axes for f in label.axes[axis])
