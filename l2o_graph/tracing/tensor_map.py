"""Mapping from tensors to values, which neither modifies the tensors nor keeps them alive."""

from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")
Geometry = tuple[int, tuple[int, ...], tuple[int, ...], object]

# Number of new storages after which entries of deleted ones are removed.
PRUNE_AFTER = 1024


class TensorMap(Generic[T]):
    """Mapping from tensors to values, keyed by storage, offset, shape, strides and dtype.

    Autograd and views create new Python objects for the same tensor, so object identity cannot be
    the key. Tensors with equal keys hold the same numbers.
    """

    def __init__(self):
        self._of: dict[int, tuple[StorageWeakRef, dict[Geometry, T]]] = {}
        self._due = PRUNE_AFTER

    def get(self, tensor: Tensor) -> T | None:
        """Return the value of a tensor, or None."""
        key = storage_of(tensor)
        known = None if key is None else self._of.get(key)
        return None if known is None else known[1].get(_geometry(tensor))

    def put(self, tensor: Tensor, value: T | None) -> None:
        """Set the value of a tensor, or remove it with None; no effect without a storage."""
        key = storage_of(tensor)
        if value is None or key is None:
            self.drop(tensor)
            return
        if key not in self._of:
            if len(self._of) >= self._due:
                self._of = {k: v for k, v in self._of.items() if not v[0].expired()}
                self._due = len(self._of) + PRUNE_AFTER
            # The weak reference frees the data, but keeps the address from being reused.
            self._of[key] = StorageWeakRef(tensor.untyped_storage()), {}
        self._of[key][1][_geometry(tensor)] = value

    def drop(self, tensor: Tensor) -> None:
        """Remove the value of a tensor, if any."""
        key = storage_of(tensor)
        if key in self._of:
            self._of[key][1].pop(_geometry(tensor), None)

    def aliases(self, tensor: Tensor) -> list[tuple[Geometry, T]]:
        """Return keys and values of all other tensors in the same storage."""
        key, own = storage_of(tensor), _geometry(tensor)
        if key not in self._of:
            return []
        return [(where, value) for where, value in self._of[key][1].items() if where != own]

    def put_at(self, tensor: Tensor, where: Geometry, value: T | None) -> None:
        """Set the value at a key of a tensor's storage, or remove it with None."""
        known = self._of[tensor.untyped_storage()._cdata][1]
        if value is None:
            known.pop(where, None)
        else:
            known[where] = value


def storage_of(tensor: Tensor) -> int | None:
    """Return the identity of a tensor's storage; None without one, as for sparse tensors."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # which of them depends on the layout
        return None


def _geometry(tensor: Tensor) -> Geometry:
    # The stride of an axis of size 1 is arbitrary.
    steps = (
        stride if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(steps), tensor.dtype


def sizes_and_strides(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape and the strides of a tensor, or 1 for each stride if it has none."""
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return tuple(tensor.shape), tuple(tensor.stride()) if strided else (1,) * tensor.dim()


def extent_of(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the last index in its storage that a tensor covers."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    first = int(tensor.storage_offset())
    return first, first + sum(max(n - 1, 0) * stride for n, stride in steps)
