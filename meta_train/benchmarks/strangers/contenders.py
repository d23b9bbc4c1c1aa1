"""The optimizers that are compared, each with its grid of rates."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from torch import nn
from torch.optim import AdamW, Optimizer

from meta_train.benchmarks.baselines import Muon
from meta_train.benchmarks.strangers import learned

LIBRARY = "pytorch_optimizer"  # of SOAP, Schedule-Free and Prodigy
AUXILIARY = 0.15  # rate of AdamW beside Muon, over Muon's: 0.003 beside 0.02
Swap = Callable[[list[Optimizer]], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Contender:
    """An optimizer.

    Attributes:
        label: For tables and plots.
        make: (network, rate, steps of the run) -> the optimizers that train it together.
        rates: The grid; a single rate where nothing is tuned.
        decays: Whether the rate falls linearly to zero over the run.
        told: Whether it knows the length of the run in another way.
        swap: Puts the weights in place that are to be evaluated, if others than those trained.
        library: A package that it needs beside the project's own.
        is_learned: Whether it is the learned one.
        run_of: The contender whose runs it is read from, if it needs none of its own.
    """

    label: str
    make: Callable[[nn.Module, float, int], list[Optimizer]]
    rates: tuple[float, ...] = (1.0,)
    decays: bool = False
    told: bool = False
    swap: Swap | None = None
    library: str = ""
    is_learned: bool = False
    run_of: str = ""

    @property
    def horizon(self) -> bool:
        """Whether a run that is to stop earlier has to be another run."""
        return self.decays or self.told


def contenders(checkpoint: str = "general") -> dict[str, Contender]:
    """All by name.

    Args:
        checkpoint: Checkpoint of the learned ones.
    """

    def adamw(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        return [AdamW(net.parameters(), lr=rate)]

    def muon(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        kernels, rest = split(net)
        found: list[Optimizer] = [Muon(kernels, lr=rate)] if kernels else []
        return [*found, AdamW(rest, lr=AUXILIARY * rate)]

    def soap(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        from pytorch_optimizer import SOAP

        return [SOAP(net.parameters(), lr=rate)]

    def schedule_free(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        from pytorch_optimizer import ScheduleFreeAdamW

        return [ScheduleFreeAdamW(net.parameters(), lr=rate)]

    def prodigy(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        from pytorch_optimizer import Prodigy

        return [Prodigy(net.parameters(), lr=rate)]

    def ng(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        return [learned.made(net, checkpoint)]

    def ng_told(net: nn.Module, rate: float, steps: int) -> list[Optimizer]:
        return [learned.made(net, checkpoint, steps)]

    return {
        "adamw": Contender("AdamW", adamw, (3e-4, 1e-3, 3e-3, 1e-2), decays=True),
        "adamw-default": Contender("AdamW, untouched", adamw, (1e-3,)),
        "muon": Contender("Muon", muon, (0.005, 0.02, 0.06), decays=True),
        "soap": Contender("SOAP", soap, (3e-3, 1e-2, 3e-2), decays=True, library=LIBRARY),
        "schedule-free": Contender(
            "Schedule-Free", schedule_free, (2.5e-3, 1e-2), swap=modes_swapped, library=LIBRARY
        ),
        "prodigy": Contender("Prodigy", prodigy, library=LIBRARY),
        "ng": Contender("NG", ng, is_learned=True),
        "ng-averaged": Contender(
            "NG, averaged", ng, swap=averages_swapped, is_learned=True, run_of="ng"
        ),
        "ng-told": Contender("NG, told", ng_told, told=True, is_learned=True),
    }


def chosen(names: tuple[str, ...], checkpoint: str) -> tuple[dict[str, Contender], list[str]]:
    """Contenders by name, and a line about each that cannot run here.

    Args:
        names: Names of ``contenders()``, or "all" or "rivals" for several.
        checkpoint: Checkpoint of the learned ones.

    Raises:
        ValueError: For a name that is not known.
    """
    known = contenders(checkpoint)
    rivals = tuple(name for name, contender in known.items() if not contender.is_learned)
    several = {"all": tuple(known), "rivals": rivals}
    wanted = list(dict.fromkeys(n for name in names for n in several.get(name, (name,))))
    for name in wanted:
        if name not in known:
            expected = ", ".join([*several, *known])
            raise ValueError(f"unknown optimizer '{name}', expected one of {expected}")
    reasons = {name: _missing(name, known[name], checkpoint) for name in wanted}
    lines = [f"optimizer {name} left out: {why}" for name, why in reasons.items() if why]
    return {name: known[name] for name in wanted if not reasons[name]}, lines


def _missing(name: str, contender: Contender, checkpoint: str) -> str:
    if contender.library and find_spec(contender.library) is None:
        return f"needs {contender.library}"
    if not contender.is_learned:
        return ""
    try:
        learned.identity(checkpoint)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    return learned.lacks(name)


def split(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What Muon takes: kernels and matrices but embeddings and the last layer; and the rest."""
    embeddings = [m.weight for m in net.modules() if isinstance(m, nn.Embedding)]
    parameters = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2 and all(p is not e for e in embeddings)]
    matrices = matrices[:-1]
    return matrices, [p for p in parameters if all(p is not m for m in matrices)]


@contextlib.contextmanager
def modes_swapped(optimizers: list[Optimizer]) -> Iterator[None]:
    """Schedule-Free's averaged weights."""
    for optimizer in optimizers:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for optimizer in optimizers:
            optimizer.train()  # type: ignore[attr-defined]


@contextlib.contextmanager
def averages_swapped(optimizers: list[Optimizer]) -> Iterator[None]:
    """The learned optimizer's averaged weights."""
    with contextlib.ExitStack() as stack:
        for optimizer in optimizers:
            stack.enter_context(learned.averaged(optimizer))
        yield
