"""Optimizers of the benchmark, each with its grid of learning rates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from l2o_graph import NGOptimizer
from l2o_graph.optim.checkpoints import load_checkpoint
from l2o_graph.ranges import NOT_NEGATIVE
from meta_train.benchmarks.muon import Muon, split_parameters

LIBRARY = "pytorch_optimizer"  # package with SOAP, Schedule-Free and Prodigy
AUXILIARY = 0.15  # learning rate of AdamW over Muon's in the same run: 0.003 with 0.02
RIVALS = ("adamw", "adamw-default", "muon", "soap", "schedule-free", "prodigy")
LEARNED = ("ng", "ng-averaged", "ng-told")
# (network, learning rate, number of steps) -> optimizers that train the network together
Make = Callable[[nn.Module, float, int], list[Optimizer]]


@dataclass(frozen=True, slots=True)
class Contender:
    """Optimizer of the benchmark."""

    label: str  # title in reports
    make: Make
    rates: tuple[float, ...] = (1.0,)  # grid of learning rates; only one if it is not tuned
    decays: bool = False  # whether the learning rate decays linearly to zero
    told: bool = False  # whether the optimizer itself is given the number of steps
    # Context in which the network has the weights to evaluate, if these are not the trained ones.
    swap: Callable[[Optimizer], AbstractContextManager[None]] | None = None
    library: str = ""  # another package that the optimizer needs
    is_learned: bool = False
    run_of: str = ""  # another contender whose runs also give the results of this one

    @property
    def depends_on_length(self) -> bool:
        """Whether a shorter run is another run, not the first part of a longer one."""
        return self.decays or self.told


def ng_optimizer(
    net: nn.Module, checkpoint: str, rate: float = 1.0, total_steps: int | None = None
) -> NGOptimizer:
    """Create an NGOptimizer with the structure of a network."""
    return NGOptimizer(
        net.parameters(), rate, model=net, checkpoint=checkpoint, total_steps=total_steps
    )


def identity(checkpoint: str) -> str:
    """Return the hash of a checkpoint's weights."""
    return load_checkpoint(checkpoint).identity.rpartition("@")[2]


def contenders(checkpoint: str = "general") -> dict[str, Contender]:
    """Return all optimizers by name, with a checkpoint for the learned ones."""

    def single(kind: Callable[..., Optimizer], **settings: object) -> Make:
        return lambda net, rate, steps: [kind(net.parameters(), lr=rate, **settings)]

    def from_library(name: str) -> Make:
        return single(lambda params, lr: getattr(import_module(LIBRARY), name)(params, lr=lr))

    def muon(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        kernels, rest = split_parameters(net)
        found: list[Optimizer] = [Muon(kernels, lr=rate)] if kernels else []
        return [*found, AdamW(rest, lr=AUXILIARY * rate)]

    def ng(told: bool) -> Make:
        return lambda net, rate, steps: [
            ng_optimizer(net, checkpoint, rate, steps if told else None)
        ]

    nesterov = single(SGD, momentum=0.9, nesterov=True)
    return {
        "adamw": Contender("AdamW", single(AdamW), (3e-4, 1e-3, 3e-3, 1e-2), decays=True),
        "adamw-default": Contender("AdamW, default", single(AdamW), (1e-3,)),
        "muon": Contender("Muon", muon, (0.005, 0.02, 0.06), decays=True),
        "soap": Contender(
            "SOAP", from_library("SOAP"), (3e-3, 1e-2, 3e-2), decays=True, library=LIBRARY
        ),
        "schedule-free": Contender(
            "Schedule-Free", from_library("ScheduleFreeAdamW"), (2.5e-3, 1e-2),
            swap=evaluation_mode, library=LIBRARY,
        ),
        "prodigy": Contender("Prodigy", from_library("Prodigy"), library=LIBRARY),
        "adam": Contender("Adam, no decay", single(Adam), (1e-3, 3e-3, 6e-3, 1e-2, 2e-2)),
        "sgd": Contender("SGD Nesterov", nesterov, (0.03, 0.1, 0.3), decays=True),
        "ng": Contender("NG", ng(False), is_learned=True),
        "ng-averaged": Contender("NG, averaged", ng(False), is_learned=True, run_of="ng"),
        "ng-told": Contender("NG, total_steps", ng(True), told=True, is_learned=True),
    }  # fmt: skip


def choose_contenders(
    names: Sequence[str], checkpoint: str, grid: Mapping[str, tuple[float, ...]] | None = None
) -> tuple[dict[str, Contender], list[str]]:
    """Find optimizers by name.

    Args:
        names: Names of optimizers, "all" or "rivals".
        checkpoint: Checkpoint of the learned ones.
        grid: Learning rates by name, instead of an optimizer's own grid.

    Returns:
        Optimizers that can run here, and a message about each of the others.

    Raises:
        ValueError: For an unknown name, and for a negative or infinite learning rate.
    """
    known, grid = contenders(checkpoint), grid or {}
    groups = {"all": (*RIVALS, *LEARNED), "rivals": RIVALS}
    wanted = [n for name in names for n in groups.get(name, (name.replace("_", "-"),))]
    for name in (*wanted, *grid):
        if name not in known:
            expected = ", ".join([*groups, *known])
            raise ValueError(f"unknown optimizer '{name}', expected one of {expected}")
    for name, rates in grid.items():
        for rate in rates:
            NOT_NEGATIVE.check(f"rate of {name}", rate)
        known[name] = replace(known[name], rates=rates)
    reasons = {name: _unavailable(known[name], checkpoint) for name in dict.fromkeys(wanted)}
    messages = [f"optimizer {name} left out: {why}" for name, why in reasons.items() if why]
    return {name: known[name] for name, why in reasons.items() if not why}, messages


def _unavailable(contender: Contender, checkpoint: str) -> str:
    """Say why an optimizer cannot run here, "" if it can."""
    if contender.library and find_spec(contender.library) is None:
        return f"needs {contender.library}"
    if contender.is_learned:
        try:
            identity(checkpoint)
        except (ValueError, OSError) as error:
            return " ".join(str(error).split())
    return ""


@contextmanager
def evaluation_mode(optimizer: Any) -> Iterator[None]:
    """Put the averaged weights of Schedule-Free in place for a while."""
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
