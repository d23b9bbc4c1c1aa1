"""Where the entries of a tensor lie in its storage."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pairs_of(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a tensor; strides of 1 where it has none."""
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return tuple(tensor.shape), tuple(tensor.stride()) if strided else (1,) * tensor.dim()


def runs_of(steps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Axes (size, stride), outermost first, as few as possible; at least one."""
    answer: list[tuple[int, int]] = []
    for size, stride in steps:
        if answer and answer[-1][1] == size * stride:
            answer[-1] = answer[-1][0] * size, stride
        elif size > 1 or not answer:
            answer.append((size, stride))
    return answer or [(1, 1)]


def number_of(digits: Sequence[int], axes: Sequence[tuple[int, int]]) -> int:
    """Which of all steps along some axes it is, the last one fastest."""
    answer = 0
    for digit, (size, _) in zip(digits, axes, strict=True):
        answer = answer * size + digit
    return answer


def span_of(tensor: Tensor) -> tuple[int, int]:
    """The first entry of its storage that a tensor has, and the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    first = int(tensor.storage_offset())
    return first, first + sum(max(n - 1, 0) * stride for n, stride in steps)
