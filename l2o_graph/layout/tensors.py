"""What kind of tensor a parameter is: whether it is sharded, and what its state is kept in."""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:  # importing it takes long, and most have no use for it
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor | type) -> "TypeGuard[DTensor]":
    """Whether a tensor, or any of a type, is a DTensor; importing that class takes long."""
    return hasattr(tensor, "full_tensor")


def is_wrapper(kind: type) -> bool:
    """Whether tensors of a type hold others, which they compute with, but for sharded ones."""
    plain = Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]  # by its stub
    return kind.__torch_dispatch__ is not plain and not is_sharded(kind)


def state_type(weight: Tensor) -> torch.dtype:
    """What the state of a weight is kept in: float64 for float64, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
