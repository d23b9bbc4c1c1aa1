"""Copies of modules to run for tracing, and restoration of random generators."""

import copy
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def copied_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module, except for objects in the memo, such as its parameters.

    ``memo`` holds replacements of objects by id, as for ``copy.deepcopy``; copies are added to it.
    Objects that cannot be copied are shared.
    """
    parts = list(module.modules())
    for part in parts:  # create all before filling any: they may refer to one another
        memo[id(part)] = part.__class__.__new__(part.__class__)
    for part in parts:
        for key, value in part.__dict__.items():
            if key != "_compiled_call_impl":
                memo[id(part)].__dict__[key] = copied(value, memo)
    return memo[id(module)]


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy an attribute of a module, or a batch; objects that cannot be copied are shared."""
    if id(value) in memo:
        return memo[id(value)]
    answer = value
    if isinstance(value, Tensor):
        answer = _copied_tensor(value)
    elif isinstance(value, torch.Generator):
        answer = value.clone_state()
    elif type(value) in (list, tuple, set):
        answer = type(value)(copied(each, memo) for each in value)
    elif isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        answer = copy.copy(value)
        for key, each in value.items():
            answer[key] = copied(each, memo)
    else:
        try:
            answer = copy.deepcopy(value, memo)
        except Exception:  # locks, open files, nested tensors with a history
            answer = _copied_object(value, memo)
    memo[id(value)] = answer
    memo.setdefault(id(memo), []).append(value)  # keep it alive, or its id could be reused
    return answer


def _copied_tensor(t: Tensor) -> Tensor:
    try:
        answer = t.detach().clone()
    except (NotImplementedError, RuntimeError):  # sparse tensors, and those without data
        return t
    return answer.requires_grad_(t.requires_grad)


def _copied_object(value: Any, memo: dict[int, Any]) -> Any:
    """Copy an object attribute by attribute."""
    try:
        answer = copy.copy(value)
    except Exception:
        return value
    if answer is not value and hasattr(answer, "__dict__"):
        memo[id(value)] = answer
        for key, each in vars(value).items():
            answer.__dict__[key] = copied(each, memo)
    return answer


@contextmanager
def preserved_generators(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restore the random generators of torch, Python and NumPy on exit."""
    cuda = {device for device in devices if device.type == "cuda"}
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng(devices=list(cuda)):
        try:
            yield
        finally:
            random.setstate(of_python)
            if numpy:
                numpy.random.set_state(of_numpy)
