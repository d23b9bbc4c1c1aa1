"""What a step of an optimizer costs, in forward and backward passes of the network it trains.

    python -m meta_train.step_cost --threads 1
    python -m meta_train.step_cost --memory       # of NGOptimizer: time and memory as networks grow

Everything is measured in one run, one after the other in each round, so that whatever else the
machine does falls on all alike; the figures are medians over rounds. Some steps of SOAP, and of
NGOptimizer, renew a basis: at least eleven steps are taken in a row, and the slowest is told too.
Inputs are random, and every round starts at the same weights: time does not depend on them.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from tqdm import tqdm

from l2o_graph.commands import run_command
from l2o_graph.datasets.workers import check_device
from l2o_graph.optim.checkpoints import load_checkpoint
from l2o_graph.ranges import COUNT, THREADS
from meta_train.benchmarks import memory
from meta_train.benchmarks.contenders import LIBRARY, made
from meta_train.benchmarks.muon import split
from meta_train.benchmarks.nets import GROWING, NETS, TIMED
from meta_train.benchmarks.report import table

STEPS = 11  # in a row: one more than there are from one basis to the next
WARM_UP = 2  # steps that do not count: state is made
SHORTEST = 0.05  # seconds that steps in a row take together, or there are more of them


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


def _soap(net: nn.Module) -> Any:
    from pytorch_optimizer import SOAP

    return SOAP(net.parameters())


NG = "NGOptimizer"
RIVALS: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": lambda net: AdamW(net.parameters()),
    "Muon": FlatMuon,
    "SOAP": _soap,
}
OPTIMIZERS = (*RIVALS, NG)


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


def step_costs(
    nets: Sequence[str] = tuple(TIMED),
    optimizers: Sequence[str] = OPTIMIZERS,
    checkpoint: str = "general",
    rounds: int = 1,
    device: str = "cpu",
) -> list[Cost]:
    """Measure networks of ``NETS``, in so many rounds of each.

    SOAP is left out where its library is not installed, Muon where torch has none.

    Raises:
        ValueError: For a device that torch cannot use.
    """
    check_device(device)
    lacking = {
        "SOAP": "" if find_spec(LIBRARY) else LIBRARY,
        "Muon": "" if hasattr(torch.optim, "Muon") else "torch 2.9 or newer",
    }
    for name in optimizers:
        if lacking.get(name):
            print(f"{name} left out: needs {lacking[name]}", file=sys.stderr)
    usable = [name for name in optimizers if not lacking.get(name)]
    costs: list[Cost] = []
    for name in nets:
        bench = _Bench(name, usable, checkpoint, torch.device(device))
        for _ in tqdm(range(rounds * NETS[name].repeats), name, unit="round"):
            bench.round()
        costs += bench.costs()
    return costs


class _Bench:
    """A network in as many copies as there are optimizers, and what was measured on them."""

    def __init__(self, name: str, optimizers: Sequence[str], checkpoint: str, device: torch.device):
        net = NETS[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.plain = net.make().to(device)
            self.inputs = net.inputs().to(device)
        self.name, self.classes, self.device = name, net.classes, device
        self.start = copy.deepcopy(self.plain.state_dict())
        self.copies = {name: copy.deepcopy(self.plain) for name in optimizers}
        self.optimizers = {
            name: made(copied, checkpoint) if name == NG else RIVALS[name](copied)
            for name, copied in self.copies.items()
        }
        self.passes: list[float] = []
        self.times: dict[str, list[list[float]]] = {name: [] for name in optimizers}
        for copied in self.copies.values():  # from which NGOptimizer reads the structure
            self._pass(copied)
        self._pass(self.plain)
        for name in self.copies:
            self._steps(name, WARM_UP)

    def round(self) -> None:
        """Measure everything once."""
        self.passes.append(self._timed(lambda: self._pass(self.plain)))
        for name, found in self.times.items():
            found.append(self._steps(name, STEPS))
            # Twice as often where one pass is short: so do all see the same machine.
            self.passes.append(self._timed(lambda: self._pass(self.plain)))

    def costs(self) -> list[Cost]:
        """Medians of what was measured."""
        one_pass = median(self.passes)
        return [
            Cost(self.name, name, one_pass, median(map(fmean, rows)), median(map(max, rows)))
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


def markdown(costs: Sequence[Cost]) -> str:
    """The measurements as a table."""
    rows = [["network", "pass, ms", "optimizer", "step, ms", "passes", "slowest step, passes",
             "bar"]]  # fmt: skip
    for cost in costs:
        net = NETS[cost.net]
        limit = f"≤ {net.bar:g}" if cost.optimizer == NG and net.bar is not None else ""
        rows.append([
            net.label, f"{1e3 * cost.pass_seconds:.2f}", cost.optimizer,
            f"{1e3 * cost.seconds:.2f}", f"{cost.seconds / cost.pass_seconds:.2f}",
            f"{cost.slowest / cost.pass_seconds:.2f}", limit,
        ])  # fmt: skip
    return table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print; 0 when all is done, 2 for a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.step_cost", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--threads", type=int, help="of the CPU; torch's own choice if not given")
    text = "networks to measure on [gpt to small; with --memory cnn-16 to gpt2]"
    add("--nets", nargs="+", choices=list(NETS), help=text)
    add("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    add("--checkpoint", default="general", help="of NGOptimizer: a name or a path")
    add("--rounds", type=int, default=1, help="of the largest; small networks get more")
    add("--device", default="cpu")
    add("--memory", action="store_true",
        help="of NGOptimizer: memory, and time for a parameter, as networks grow")  # fmt: skip
    given = parser.parse_args(argv)

    def work() -> list[str]:
        COUNT.check("rounds", given.rounds)
        if given.threads is not None:
            THREADS.check("threads", given.threads)
            torch.set_num_threads(given.threads)
        load_checkpoint(given.checkpoint)  # that it can be is seen before any work
        machine = f"torch {torch.__version__}, CPU threads: {torch.get_num_threads()}"
        if given.memory:
            if given.device != "cpu":
                raise ValueError(f"device: expected cpu with --memory, found '{given.device}'")
            found = memory.scales(given.nets or list(GROWING), given.checkpoint, given.rounds)
            return [memory.markdown(found), f"\n{machine}"]
        nets = given.nets or list(TIMED)
        costs = step_costs(nets, given.optimizers, given.checkpoint, given.rounds, given.device)
        explained = f"Means of at least {STEPS} steps in a row, medians over rounds; "
        return [markdown(costs), f"\n{explained}{machine}"]

    return run_command("step_cost", work, stopped="stopped")
