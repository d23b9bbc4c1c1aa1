"""Saved states, and the checks before a state is loaded."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from l2o_graph.optim.sharded import Sharing

MOST_STEPS = 1e9  # a larger number of steps is invalid


def with_step(saved: Any, key: Any) -> dict[str, Any]:
    """Convert the "step" of a parameter's state to a tensor; other programs store a number.

    Raises:
        ValueError: For an invalid state, and for an invalid number of steps.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"state_dict: expected the state of parameter {key}, found {saved!r}")
    if "step" not in saved:
        return dict(saved)
    step = saved["step"]
    number = step.tolist() if isinstance(step, Tensor) else step
    right = isinstance(number, Real) and not isinstance(number, bool)
    count: Any = number  # type checkers do not know that Real is ordered
    if not right or not 0 <= count < MOST_STEPS or count % 1:
        raise ValueError(
            f"state_dict: expected a number of steps for parameter {key}, found {number!r}"
        )
    return {**saved, "step": step if isinstance(step, Tensor) else torch.tensor(float(count))}


def check_numbers(saved: Mapping[str, Tensor], key: Any) -> None:
    """Raise a ValueError for NaN and infinity, which one step would spread to all weights."""
    for name, tensor in saved.items():
        bad = ~tensor.isfinite()
        if bool(bad.any()):
            raise ValueError(
                f"state_dict: for parameter {key}, expected finite numbers, found NaN or infinity "
                f"in {int(bad.sum())} of {bad.numel()} entries of '{name}'"
            )


def check_state(saved: Mapping[str, Any], key: Any, parameter: Tensor) -> None:
    """Raise for anything but the state of a parameter of ``NGOptimizer``."""
    if not {"step", "offset"} <= saved.keys():
        raise ValueError(
            f"state_dict: expected a step and an offset of parameter {key}, found {sorted(saved)}; "
            "states of earlier versions of the rule cannot be loaded"
        )
    for name, value in saved.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state_dict: for parameter {key}, expected tensors, found '{name}': {value!r}"
            )
    shape = saved["offset"].shape
    if shape != parameter.shape:
        raise ValueError(
            f"state_dict: expected an offset of shape {list(parameter.shape)} for parameter "
            f"{key}, found {list(shape)}"
        )
    check_numbers(saved, key)


def is_owned(name: str) -> bool:
    """Return whether only the owner of a parameter holds the tensor of this name.

    All ranks hold the number of steps and the state of rows and matrices.
    """
    return name.partition(".")[0] not in ("step", "rows", "tensors")


def sharded_state(
    found: dict[str, Any], sharing: Sharing, parameters: Sequence[Tensor]
) -> dict[str, Any]:
    """Replace tensors that one rank owns by DTensors; ``parameters`` are in order of groups."""
    ids = [key for group in found["param_groups"] for key in group["params"]]
    parameter_of = dict(zip(ids, parameters, strict=True))
    # Contiguous, because broadcasting a state requires it.
    state = {
        key: {
            name: sharing.saved(parameter_of[key], t) if is_owned(name) else t.contiguous()
            for name, t in of_one.items()
        }
        for key, of_one in found["state"].items()
    }
    return {**found, "state": state}
