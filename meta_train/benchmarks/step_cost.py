"""What a step of an optimizer costs, in forward and backward passes of the network it trains.

    python -m meta_train.step_cost --threads 1

Everything is measured in one run, one after the other in each round, so that whatever else the
machine does falls on all alike; the figures are medians over rounds. Some steps of SOAP, and of
NGOptimizer, renew a basis: at least eleven steps are taken in a row, and the slowest is told too.
Inputs are random, and every round starts at the same weights: time does not depend on them.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchvision.models import resnet18
from tqdm import tqdm

from l2o_graph.commands import run_command
from l2o_graph.datasets.workers import check_device
from l2o_graph.optim.checkpoints import load_checkpoint
from l2o_graph.ranges import COUNT, THREADS
from meta_train.benchmarks.contenders import LIBRARY, made
from meta_train.benchmarks.muon import split
from meta_train.benchmarks.report import table
from meta_train.benchmarks.scaling import gpt2
from meta_train.benchmarks.strangers.networks import mlp
from meta_train.tasks.image_classification import cnn

STEPS = 11  # in a row: one more than there are from one basis to the next
WARM_UP = 2  # steps that do not count: state is made
SHORTEST = 0.05  # seconds that steps in a row take together, or there are more of them


@dataclass(frozen=True, slots=True)
class Net:
    """A network to measure on.

    Attributes:
        label: For the table.
        make: The network.
        inputs: A batch for it.
        classes: That a score is given to.
        bar: The most that a step of NGOptimizer may cost, in passes.
        repeats: Rounds of this one for each round of the others; short times need more.
    """

    label: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    classes: int = 10
    bar: float | None = None
    repeats: int = 1


WORDS = 2048
NETS = {
    "gpt": Net(
        "GPT, 5.3 M, 8 x 128 tokens", lambda: gpt2(WORDS, 128, 256, 6),
        lambda: torch.randint(0, WORDS, (8, 128)), WORDS, 0.6,
    ),
    "resnet18": Net(
        "resnet18, 16 images of 64 x 64", resnet18, lambda: torch.randn(16, 3, 64, 64), 1000, 3.0
    ),
    "mlp": Net(
        "MLP 784-1024-1024-10, batch 128", lambda: mlp(784, 1024, 1024, 10),
        lambda: torch.randn(128, 784), bar=6.0, repeats=3,
    ),
    "cifar10": Net(
        "CIFAR-10 CNN, batch 128", lambda: cnn(3, 32, 32), lambda: torch.randn(128, 3, 32, 32),
        bar=0.12, repeats=5,
    ),
    "fmnist": Net(
        "FashionMNIST CNN, batch 128", lambda: cnn(1, 28, 16),
        lambda: torch.randn(128, 1, 28, 28), repeats=9,
    ),
    "small": Net(
        "MLP 64-128-64-10, batch 64", lambda: mlp(64, 128, 64, 10), lambda: torch.randn(64, 64),
        bar=4.0, repeats=9,
    ),
}  # fmt: skip
NG = "NGOptimizer"
OPTIMIZERS = ("AdamW", "Muon", "SOAP", NG)


@dataclass(frozen=True, slots=True)
class Cost:
    """What the steps of an optimizer took on a network.

    Medians over rounds: of a forward and backward pass, of the mean of some steps in a row, and of
    the longest of these.
    """

    net: str
    optimizer: str
    pass_seconds: float
    seconds: float
    slowest: float

    @property
    def passes(self) -> float:
        """A step, in forward and backward passes."""
        return self.seconds / self.pass_seconds

    @property
    def slowest_passes(self) -> float:
        """The slowest step, in forward and backward passes."""
        return self.slowest / self.pass_seconds


class FlatMuon:
    """torch's Muon, which takes matrices alone, with kernels seen as such; AdamW for the rest."""

    def __init__(self, net: nn.Module):
        self._kernels, rest = split(net)
        # Parameters of their own that lie where the kernels do.
        self._flat = [nn.Parameter(p.detach().flatten(1)) for p in self._kernels]
        self._optimizers = [torch.optim.Muon(self._flat), AdamW(rest)]

    def step(self) -> None:
        """Update all parameters."""
        for kernel, flat in zip(self._kernels, self._flat, strict=True):
            flat.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for optimizer in self._optimizers:
            optimizer.step()


def step_costs(
    nets: Sequence[str] = tuple(NETS),
    optimizers: Sequence[str] = OPTIMIZERS,
    checkpoint: str = "general",
    rounds: int = 1,
    device: str = "cpu",
) -> list[Cost]:
    """Measure.

    Args:
        nets: Keys of ``NETS``.
        optimizers: Names of ``OPTIMIZERS``; SOAP is left out where its library is not installed,
            Muon where torch has none.
        checkpoint: Checkpoint of NGOptimizer.
        rounds: Measurements of each.
        device: To measure on.

    Raises:
        ValueError: For names that are not known, fewer than one round, a device that torch cannot
            use, and a checkpoint that does not load.
    """
    for names, known in ((nets, NETS), (optimizers, OPTIMIZERS)):
        for name in names:
            if name not in known:
                raise ValueError(f"unknown '{name}', expected one of {', '.join(known)}")
    COUNT.check("rounds", rounds)
    check_device(device)
    load_checkpoint(checkpoint)  # that it can be is seen before any work
    lacking = {
        "SOAP": None if find_spec(LIBRARY) else LIBRARY,
        "Muon": None if hasattr(torch.optim, "Muon") else "torch 2.9 or newer",
    }
    for name, needed in lacking.items():
        if needed and name in optimizers:
            print(f"{name} left out: needs {needed}", file=sys.stderr)
            optimizers = [other for other in optimizers if other != name]
    costs: list[Cost] = []
    with tqdm(total=sum(rounds * NETS[name].repeats for name in nets), unit="round") as progress:
        for name in nets:
            bench = _Bench(NETS[name], optimizers, checkpoint, torch.device(device))
            for _ in bench.rounds(rounds * NETS[name].repeats):
                progress.update()
            costs += bench.costs(name)
    return costs


class _Bench:
    """A network in as many copies as there are optimizers, and what was measured on them."""

    def __init__(self, net: Net, optimizers: Sequence[str], checkpoint: str, device: torch.device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.plain = net.make().to(device)
            self.inputs = net.inputs().to(device)
        self.classes, self.device = net.classes, device
        self.start = copy.deepcopy(self.plain.state_dict())
        self.copies = {name: copy.deepcopy(self.plain) for name in optimizers}
        self.optimizers = {n: _made(n, net, checkpoint) for n, net in self.copies.items()}
        self.passes: list[float] = []
        self.times: dict[str, list[list[float]]] = {name: [] for name in optimizers}
        for copied in self.copies.values():  # from which NGOptimizer reads the structure
            self._pass(copied)
        self._pass(self.plain)

    def rounds(self, count: int) -> Iterator[None]:
        """Measure everything so many times."""
        for name in self.copies:
            self._steps(name, WARM_UP)
        for _ in range(count):
            self.passes.append(self._timed(lambda: self._pass(self.plain)))
            for name, found in self.times.items():
                found.append(self._steps(name, STEPS))
                # Twice as often where one pass is short: so do all see the same machine.
                self.passes.append(self._timed(lambda: self._pass(self.plain)))
            yield

    def costs(self, net: str) -> list[Cost]:
        """Medians of what was measured."""
        one_pass = median(self.passes)
        return [
            Cost(net, name, one_pass, median(map(fmean, rows)), median(map(max, rows)))
            for name, rows in self.times.items()
        ]

    def _steps(self, name: str, count: int) -> list[float]:
        """Seconds of each of the steps in a row, from the same weights with the same gradients."""
        trained, optimizer = self.copies[name], self.optimizers[name]
        trained.load_state_dict(self.start)
        for p, q in zip(trained.parameters(), self.plain.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        times: list[float] = []
        while len(times) < count or (count > WARM_UP and sum(times) < SHORTEST):
            times.append(self._timed(optimizer.step))
        return times

    def _pass(self, net: nn.Module) -> None:
        net.zero_grad()
        scores = net(self.inputs).flatten(0, -2)
        labels = torch.arange(len(scores), device=self.device) % self.classes
        F.cross_entropy(scores, labels).backward()

    def _timed(self, work: Callable[[], object]) -> float:
        begin = self._now()
        work()
        return self._now() - begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _made(name: str, net: nn.Module, checkpoint: str) -> Optimizer | FlatMuon:
    if name == "AdamW":
        return AdamW(net.parameters())
    if name == "Muon":
        return FlatMuon(net)
    if name == NG:
        return made(net, checkpoint)
    from pytorch_optimizer import SOAP

    return SOAP(net.parameters())


def markdown(costs: Sequence[Cost]) -> str:
    """The measurements as a table."""
    rows = [["network", "pass, ms", "optimizer", "step, ms", "passes", "slowest step, passes",
             "bar"]]  # fmt: skip
    for cost in costs:
        net = NETS[cost.net]
        limit = f"≤ {net.bar:g}" if cost.optimizer == NG and net.bar is not None else ""
        times = f"{1e3 * cost.seconds:.2f}", f"{cost.passes:.2f}", f"{cost.slowest_passes:.2f}"
        rows.append([net.label, f"{1e3 * cost.pass_seconds:.2f}", cost.optimizer, *times, limit])
    return table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print; 0 when all is done, 2 for a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.step_cost", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--threads", type=int, help="of the CPU; torch's own choice if not given")
    add("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    add("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    add("--checkpoint", default="general", help="of NGOptimizer: a name or a path")
    add("--rounds", type=int, default=1, help="of the largest; small networks get more")
    add("--device", default="cpu")
    args = vars(parser.parse_args(argv))
    threads = args.pop("threads")

    def work() -> list[str]:
        if threads is not None:
            THREADS.check("threads", threads)
            torch.set_num_threads(threads)
        return [
            markdown(step_costs(**args)),
            f"\nMeans of at least {STEPS} steps in a row, medians over rounds; "
            f"torch {torch.__version__}, CPU threads: {torch.get_num_threads()}",
        ]

    return run_command("step_cost", work, stopped="stopped")
