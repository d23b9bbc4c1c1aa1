"""What a module and its parameters have to be."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

SHOWN = 40  # an error shows a thing of another kind in full up to so many characters


def check_module(module: object, name: str) -> None:
    """Refuse what is no network whose computation Python can follow; ``name`` is the argument's.

    Raises:
        TypeError: For what is no module, and for one that is scripted or traced.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected a module, found {shown(module)}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{name}: expected a module that Python computes, found one of TorchScript "
            f"({type(module).__name__}); give the module that it was made from"
        )


def check_parameter(parameter: object, name: str) -> None:
    """Refuse what has no shape; ``name`` is the parameter's, for the error.

    Raises:
        TypeError: For what is no tensor.
        ValueError: For a parameter of a lazy module that was not called yet.
    """
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {shown(parameter)}")
    if is_lazy(parameter):
        raise ValueError(
            f"{name}: expected a tensor with a shape, found one of a lazy module, which has none "
            "before the network's first batch; call the network once before"
        )


def shown(value: object) -> str:
    """What errors show of a thing of another kind than was expected."""
    text = repr(value)
    return type(value).__name__ + (f" {text}" if len(text) <= SHOWN else "")
