"""Properties of parameters: whether they are sharded, and the type of their state."""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:  # importing it takes long, and few users need it
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor | type) -> "TypeGuard[DTensor]":
    """Return whether a tensor or a type is a DTensor, without the slow import of that class."""
    return hasattr(tensor, "full_tensor")


def is_wrapper(kind: type) -> bool:
    """Return whether a type is a tensor subclass that wraps other tensors, except for DTensors."""
    plain = Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]  # by its stub
    return kind.__torch_dispatch__ is not plain and not is_sharded(kind)


def state_type(weight: Tensor) -> torch.dtype:
    """Return the type of a weight's state: float64 for float64, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
