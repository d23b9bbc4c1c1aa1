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
from importlib import import_module
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
# Steps that do not count. In the first one NGOptimizer makes its state, and until this one it renews
# powers more often than in the rest of a run.
WARM_UP = 64
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


NG = "NGOptimizer"
RIVALS: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": lambda net: AdamW(net.parameters()),
    "Muon": FlatMuon,
    "SOAP": lambda net: import_module(LIBRARY).SOAP(net.parameters()),
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
    lacking: dict[str, str] = {}
    if find_spec(LIBRARY) is None:
        lacking["SOAP"] = LIBRARY
    if not hasattr(torch.optim, "Muon"):
        lacking["Muon"] = "torch 2.9 or newer"
    for name in optimizers:
        if name in lacking:
            print(f"{name} left out: needs {lacking[name]}", file=sys.stderr)
    usable = [name for name in optimizers if name not in lacking]
    place = torch.device(device)
    return [cost for net in nets for cost in _measured(net, usable, checkpoint, rounds, place)]


def _measured(
    name: str, optimizers: Sequence[str], checkpoint: str, rounds: int, device: torch.device
) -> list[Cost]:
    """Measure a network, in as many copies as there are optimizers."""
    net = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = net.make().to(device)
        inputs = net.inputs().to(device)
    start = copy.deepcopy(plain.state_dict())
    copies = {optimizer: copy.deepcopy(plain) for optimizer in optimizers}
    makers = {**RIVALS, NG: lambda module: made(module, checkpoint)}
    at_work = {optimizer: makers[optimizer](copied) for optimizer, copied in copies.items()}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def one_pass(model: nn.Module) -> float:
        """Seconds of a forward and backward pass."""
        begin = now()
        model.zero_grad()
        scores = model(inputs).flatten(0, -2)
        labels = torch.arange(len(scores), device=device) % net.classes
        F.cross_entropy(scores, labels).backward()
        return now() - begin

    def steps(optimizer: str, count: int, shortest: float = 0.0) -> list[float]:
        """Seconds of each of the steps in a row, from the same weights with the same gradients."""
        trained, times = copies[optimizer], []
        trained.load_state_dict(start)
        for p, q in zip(trained.parameters(), plain.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        while len(times) < count or sum(times) < shortest:
            begin = now()
            at_work[optimizer].step()
            times.append(now() - begin)
        return times

    for model in (*copies.values(), plain):  # of its copy NGOptimizer reads the structure
        one_pass(model)
    for optimizer in optimizers:
        steps(optimizer, WARM_UP)
    passes: list[float] = []
    rows: dict[str, list[list[float]]] = {optimizer: [] for optimizer in optimizers}
    for _ in tqdm(range(rounds * net.repeats), name, unit="round"):
        for optimizer, found in rows.items():
            passes.append(one_pass(plain))
            found.append(steps(optimizer, STEPS, SHORTEST))
        passes.append(one_pass(plain))
    return [
        Cost(name, optimizer, median(passes), median(map(fmean, found)), median(map(max, found)))
        for optimizer, found in rows.items()
    ]


def markdown(costs: Sequence[Cost]) -> str:
    """The measurements as a table."""
    head = ["network", "pass, ms", "optimizer", "step, ms", "passes", "slowest step, passes"]
    rows = [
        [
            NETS[cost.net].label, f"{1e3 * cost.pass_seconds:.2f}", cost.optimizer,
            f"{1e3 * cost.seconds:.2f}", f"{cost.seconds / cost.pass_seconds:.2f}",
            f"{cost.slowest / cost.pass_seconds:.2f}",
        ]
        for cost in costs
    ]  # fmt: skip
    return table([head, *rows])


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
    text = "of NGOptimizer: memory, and time for a parameter, as networks grow"
    add("--memory", action="store_true", help=text)
    given = parser.parse_args(argv)

    def work() -> list[str]:
        rounds, checkpoint, device = given.rounds, given.checkpoint, given.device
        COUNT.check("rounds", rounds)
        if given.threads is not None:
            THREADS.check("threads", given.threads)
            torch.set_num_threads(given.threads)
        load_checkpoint(checkpoint)  # that it can be is seen before any work
        machine = f"torch {torch.__version__}, CPU threads: {torch.get_num_threads()}"
        if given.memory:
            if device != "cpu":
                raise ValueError(f"device: expected cpu with --memory, found '{device}'")
            found = memory.scales(given.nets or list(GROWING), checkpoint, rounds)
            return [memory.markdown(found), f"\n{machine}"]
        nets = given.nets or list(TIMED)
        costs = step_costs(nets, given.optimizers, checkpoint, rounds, device)
        explained = f"Means of at least {STEPS} steps in a row, medians over rounds; "
        return [markdown(costs), f"\n{explained}{machine}"]

    return run_command("step_cost", work, stopped="stopped")
