"""What a state that is loaded has to be, whichever optimizer it is of."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from l2o_graph.optim.sharded import whole

MOST_STEPS = 1e9  # whatever is above is no number of steps


def with_step(saved: Any, key: Any) -> dict[str, Any]:
    """A parameter's state whose "step" is a tensor without axes; other programs store a number.

    Args:
        saved: What the state has of the parameter.
        key: Of the parameter in the state, for errors.

    Raises:
        ValueError: For what is no state, and where the step is no number of steps.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"state_dict: expected the state of parameter {key}, found {saved!r}")
    if "step" not in saved:
        return dict(saved)
    step = saved["step"]
    number = step.tolist() if isinstance(step, Tensor) else step
    right = isinstance(number, Real) and not isinstance(number, bool)
    if not right or not 0 <= number < MOST_STEPS or number % 1:
        raise ValueError(
            f"state_dict: expected a number of steps for parameter {key}, found {number!r}"
        )
    return {**saved, "step": step if isinstance(step, Tensor) else torch.tensor(float(number))}


def check_numbers(saved: Mapping[str, Tensor], key: Any, parameter: Tensor) -> None:
    """Refuse what one step would carry into all weights: NaN, and numbers that are infinite.

    An average may have them where the parameter itself does, as a mask has that nobody trains.

    Args:
        saved: Of the parameter, tensors by name.
        key: Of the parameter in the state, for errors.
        parameter: The parameter.

    Raises:
        ValueError: Naming the parameter and the tensor.
    """
    for name, tensor in saved.items():
        bad = ~tensor.isfinite()
        if name == "average":
            bad &= whole(parameter).isfinite().to(bad.device)
        if bool(bad.any()):
            raise ValueError(
                f"state_dict: for parameter {key}, expected finite numbers, found {int(bad.sum())} "
                f"others of {bad.numel()} in '{name}'"
            )
