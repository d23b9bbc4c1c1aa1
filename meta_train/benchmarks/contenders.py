"""The optimizers that are compared, each with its grid of rates."""

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
from meta_train.benchmarks.muon import Muon, split

LIBRARY = "pytorch_optimizer"  # of SOAP, Schedule-Free and Prodigy
AUXILIARY = 0.15  # rate of AdamW beside Muon, over Muon's: 0.003 beside 0.02
RIVALS = ("adamw", "adamw-default", "muon", "soap", "schedule-free", "prodigy")
LEARNED = ("ng", "ng-averaged", "ng-told")
# (network, rate, steps of the run) -> the optimizers that train it together.
Make = Callable[[nn.Module, float, int], list[Optimizer]]


@dataclass(frozen=True, slots=True)
class Contender:
    """An optimizer."""

    label: str
    make: Make
    rates: tuple[float, ...] = (1.0,)  # the grid; a single rate where nothing is tuned
    decays: bool = False  # whether the rate falls linearly to zero over the run
    told: bool = False  # whether it knows the length of the run in another way
    # Puts the weights in place that are to be evaluated, if others than those trained.
    swap: Callable[[Optimizer], AbstractContextManager[None]] | None = None
    library: str = ""  # that it needs beside the project's own
    is_learned: bool = False
    run_of: str = ""  # the contender whose runs it is read from, if it needs none of its own

    @property
    def horizon(self) -> bool:
        """Whether a run that is to stop earlier has to be another run."""
        return self.decays or self.told


def made(
    net: nn.Module, checkpoint: str, rate: float = 1.0, total_steps: int | None = None
) -> NGOptimizer:
    """NGOptimizer as its users make it."""
    return NGOptimizer(
        net.parameters(), rate, model=net, checkpoint=checkpoint, total_steps=total_steps
    )


def identity(checkpoint: str) -> str:
    """What tells a checkpoint's weights from all others, whatever its file is called."""
    return load_checkpoint(checkpoint).identity.rpartition("@")[2]


def contenders(checkpoint: str = "general") -> dict[str, Contender]:
    """All by name, the learned ones of a checkpoint."""

    def one(kind: Callable[..., Optimizer], **settings: object) -> Make:
        return lambda net, rate, steps: [kind(net.parameters(), lr=rate, **settings)]

    def of_library(name: str) -> Make:
        return one(lambda *given, **more: getattr(import_module(LIBRARY), name)(*given, **more))

    def muon(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        kernels, rest = split(net)
        found: list[Optimizer] = [Muon(kernels, lr=rate)] if kernels else []
        return [*found, AdamW(rest, lr=AUXILIARY * rate)]

    def ng(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        return [made(net, checkpoint, rate)]

    def ng_told(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        return [made(net, checkpoint, rate, steps)]

    nesterov = one(SGD, momentum=0.9, nesterov=True)
    return {
        "adamw": Contender("AdamW", one(AdamW), (3e-4, 1e-3, 3e-3, 1e-2), decays=True),
        "adamw-default": Contender("AdamW, default", one(AdamW), (1e-3,)),
        "muon": Contender("Muon", muon, (0.005, 0.02, 0.06), decays=True),
        "soap": Contender(
            "SOAP", of_library("SOAP"), (3e-3, 1e-2, 3e-2), decays=True, library=LIBRARY
        ),
        "schedule-free": Contender(
            "Schedule-Free", of_library("ScheduleFreeAdamW"), (2.5e-3, 1e-2), swap=modes_swapped,
            library=LIBRARY,
        ),
        "prodigy": Contender("Prodigy", of_library("Prodigy"), library=LIBRARY),
        "adam": Contender("Adam, no decay", one(Adam), (1e-3, 3e-3, 6e-3, 1e-2, 2e-2)),
        "sgd": Contender("SGD Nesterov", nesterov, (0.03, 0.1, 0.3), decays=True),
        "ng": Contender("NG", ng, is_learned=True),
        "ng-averaged": Contender("NG, averaged", ng, is_learned=True, run_of="ng"),
        "ng-told": Contender("NG, total_steps", ng_told, told=True, is_learned=True),
    }  # fmt: skip


def chosen(
    names: Sequence[str], checkpoint: str, grid: Mapping[str, tuple[float, ...]] | None = None
) -> tuple[dict[str, Contender], list[str]]:
    """Contenders by name, and a line about each that cannot run here.

    ``names`` may be "all" or "rivals", too; ``grid`` has rates in place of a contender's own.

    Raises:
        ValueError: For a name that is not known, and a rate that is none.
    """
    known, grid = contenders(checkpoint), grid or {}
    several = {"all": (*RIVALS, *LEARNED), "rivals": RIVALS}
    wanted = [n for name in names for n in several.get(name, (name.replace("_", "-"),))]
    for name in (*wanted, *grid):
        if name not in known:
            expected = ", ".join([*several, *known])
            raise ValueError(f"unknown optimizer '{name}', expected one of {expected}")
    for name, rates in grid.items():
        for rate in rates:
            NOT_NEGATIVE.check(f"rate of {name}", rate)
    known |= {name: replace(known[name], rates=rates) for name, rates in grid.items()}
    reasons = {name: _missing(known[name], checkpoint) for name in dict.fromkeys(wanted)}
    lines = [f"optimizer {name} left out: {why}" for name, why in reasons.items() if why]
    return {name: known[name] for name, why in reasons.items() if not why}, lines


def _missing(contender: Contender, checkpoint: str) -> str:
    if contender.library and find_spec(contender.library) is None:
        return f"needs {contender.library}"
    if contender.is_learned:
        try:
            identity(checkpoint)
        except (ValueError, OSError) as error:
            return " ".join(str(error).split())
    return ""


@contextmanager
def modes_swapped(optimizer: Any) -> Iterator[None]:
    """Schedule-Free's averaged weights."""
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
