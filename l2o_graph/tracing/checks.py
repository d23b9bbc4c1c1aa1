"""Validation of modules and parameters."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

SHOWN = 40  # longest representation of a value that an error quotes, in characters


def check_module(module: object, name: str) -> None:
    """Check that the argument ``name`` is a module that runs in Python.

    Raises:
        TypeError: For anything but a module, and for a scripted or traced module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected a module, found {shown(module)}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{name}: expected a module that runs in Python, found one of TorchScript "
            f"({type(module).__name__}); pass the module that it was made from"
        )


def named_parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    """List all parameters, though a module may override its methods to list only some."""
    return [*nn.Module.named_parameters(module)]


def parameters_of(module: nn.Module) -> list[Tensor]:
    """List all parameters, as ``named_parameters`` does."""
    return [p for _, p in named_parameters(module)]


def check_parameter(parameter: object, name: str) -> None:
    """Check that the parameter ``name`` is a tensor with a shape.

    Raises:
        TypeError: For anything but a tensor.
        ValueError: For a parameter of a lazy module before its first call.
    """
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {shown(parameter)}")
    if is_lazy(parameter):
        raise ValueError(
            f"{name}: expected a tensor with a shape, found one of a lazy module, which has none "
            "before its first call; call the network once with a batch"
        )


def shown(value: object) -> str:
    """Describe a value of an unexpected type for an error: its type and short representation."""
    text = repr(value)
    return type(value).__name__ + (f" {text}" if len(text) <= SHOWN else "")
