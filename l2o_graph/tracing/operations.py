"""Rules of torch's own operations: how one is told, and what rules share."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from l2o_graph.tracing.labels import Label

Operation = Callable[..., Label | None]
OPERATIONS: dict[str, Operation] = {}
ALONG_AXES: set[str] = set()


def operation(*names: str, axes: bool = False) -> Callable[[Operation], Operation]:
    """Make a function the rule of operators: (trace, out, *args, **kwargs) -> label of out.

    The answer is None where it cannot be followed: the neurons of all inputs then keep their order.

    Args:
        names: Names of the operators.
        axes: Whether the rule is told, in place of all arguments behind the first tensor, which
            axes the operator works along.
    """

    def add(rule: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, rule))
        if axes:
            ALONG_AXES.update(names)
        return rule

    return add


def dims_of(x: Tensor, dims: Any) -> list[int]:
    """Axes as operators name them, by number or in a list; all of them for none."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(x.dim()))
    return [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)] if x.dim() else []


def only_data(label: Label, axes: Iterable[int]) -> bool:
    """Whether no neurons run along some axes."""
    return all(f.set is None for axis in axes for f in label.axes[axis])
