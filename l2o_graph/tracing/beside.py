"""What is known of tensors, kept beside them: nothing is written on a tensor or kept alive."""

from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")
Geometry = tuple[int, tuple[int, ...], tuple[int, ...], object]

# After so many new storages those that are gone are forgotten.
SOME = 1024


class Beside(Generic[T]):
    """Something for each tensor, told by its storage and by where in it the tensor lies.

    Autograd and views make new Python objects for what is one tensor, so objects tell nothing;
    tensors that lie in the same place of the same storage are the same numbers.
    """

    def __init__(self):
        self._of: dict[int, tuple[StorageWeakRef, dict[Geometry, T]]] = {}
        self._due = SOME

    def get(self, tensor: Tensor) -> T | None:
        """What is known of a tensor; None for nothing."""
        key = storage_of(tensor)
        known = None if key is None else self._of.get(key)
        return None if known is None else known[1].get(_geometry(tensor))

    def put(self, tensor: Tensor, value: T | None) -> None:
        """Know something of a tensor, None for nothing more; without a storage nothing can be."""
        key = storage_of(tensor)
        if value is None:
            return self.drop(tensor)
        if key is None:
            return None
        if key not in self._of:
            if len(self._of) >= self._due:
                self._of = {k: v for k, v in self._of.items() if not v[0].expired()}
                self._due = len(self._of) + SOME
            # While it is held the address is not given to another storage; the numbers are freed.
            self._of[key] = StorageWeakRef(tensor.untyped_storage()), {}
        self._of[key][1][_geometry(tensor)] = value
        return None

    def drop(self, tensor: Tensor) -> None:
        """Know nothing of a tensor any more."""
        key = storage_of(tensor)
        if key in self._of:
            self._of[key][1].pop(_geometry(tensor), None)

    def sharing(self, tensor: Tensor) -> list[tuple[Geometry, T]]:
        """What is known of other tensors in the same storage: (where they lie, what is known)."""
        key, own = storage_of(tensor), _geometry(tensor)
        if key not in self._of:
            return []
        return [(where, value) for where, value in self._of[key][1].items() if where != own]

    def rewrite(self, tensor: Tensor, where: Geometry, value: T | None) -> None:
        """Change what is known of another tensor in the same storage; None to know nothing."""
        known = self._of[tensor.untyped_storage()._cdata][1]
        if value is None:
            known.pop(where, None)
        else:
            known[where] = value


def storage_of(tensor: Tensor) -> int | None:
    """The identity of a tensor's storage; None where it has none, as sparse ones."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # which of them depends on the layout
        return None


def _geometry(tensor: Tensor) -> Geometry:
    # How far it is to the next entry says nothing along an axis that has none.
    steps = (
        stride if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(steps), tensor.dtype


def pairs_of(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a tensor; strides of 1 where it has none."""
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return tuple(tensor.shape), tuple(tensor.stride()) if strided else (1,) * tensor.dim()


def span_of(tensor: Tensor) -> tuple[int, int]:
    """The first entry of its storage that a tensor has, and the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    first = int(tensor.storage_offset())
    return first, first + sum(max(n - 1, 0) * stride for n, stride in steps)
