"""The learned optimizer, called in this file alone."""

import contextlib
import inspect

from torch import nn
from torch.optim import Optimizer

from l2o_graph import NGOptimizer


def made(net: nn.Module, checkpoint: str, total_steps: int | None = None) -> Optimizer:
    """NGOptimizer as its users make it.

    Args:
        net: To be trained.
        checkpoint: A name or a path.
        total_steps: The length of the run, if it is to know it.
    """
    return NGOptimizer(net.parameters(), model=net, checkpoint=checkpoint, total_steps=total_steps)


def averaged(optimizer: Optimizer) -> contextlib.AbstractContextManager[object]:
    """The averaged weights in place of the last ones."""
    return optimizer.averaged()  # type: ignore[attr-defined]


def identity(checkpoint: str) -> str:
    """What tells a checkpoint's weights from all others, whatever its file is called.

    Raises:
        ValueError, FileNotFoundError: Where there is none.
    """
    weights = nn.Linear(2, 2)
    return str(made(weights, checkpoint).defaults["checkpoint"]).rpartition("@")[2]


def lacks(name: str) -> str:
    """Why a learned contender cannot run here; empty if it can."""
    if name == "ng-told" and "total_steps" not in inspect.signature(NGOptimizer).parameters:
        return "NGOptimizer takes no total_steps"
    if name == "ng-averaged" and not hasattr(NGOptimizer, "averaged"):
        return "NGOptimizer has no averaged()"
    return ""
