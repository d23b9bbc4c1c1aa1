"""Cost of an optimizer's step, in forward and backward passes of the network.

    python -m meta_train.step_cost --threads 1
    python -m meta_train.step_cost --memory       # memory and time of NGOptimizer by network size

All optimizers are measured in turn, in several rounds of one process, so that other load on the
machine affects all of them; results are medians over rounds. Some steps of SOAP and NGOptimizer
update an eigenbasis, so at least eleven consecutive steps are measured, and the slowest is reported
too. Inputs are random and each round starts with the same weights, which does not affect the time.
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
from meta_train.benchmarks.contenders import LIBRARY, ng_optimizer
from meta_train.benchmarks.muon import split_parameters
from meta_train.benchmarks.nets import GROWING, NETS, TIMED
from meta_train.benchmarks.report import table

STEPS = 11  # number of consecutive steps, one more than between updates of the eigenbasis
# Number of steps that are not measured. In the first, state is created, and until the last of
# its own NGOptimizer recomputes powers more often than in the rest of a run.
WARM_UP, WARM_UP_OF_NG = 2, 64
SHORTEST = 0.05  # seconds that consecutive steps take at least


class FlatMuon:
    """torch's Muon with kernels viewed as matrices, and AdamW for the other parameters."""

    def __init__(self, net: nn.Module):
        self._kernels, rest = split_parameters(net)
        # Views that share the memory of the kernels.
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
    """Cost of an optimizer on a network; times are medians over rounds."""

    net: str
    optimizer: str
    pass_seconds: float  # forward and backward pass
    seconds: float  # mean of consecutive steps
    slowest: float  # slowest of consecutive steps


def step_costs(
    nets: Sequence[str] = tuple(TIMED),
    optimizers: Sequence[str] = OPTIMIZERS,
    checkpoint: str = "general",
    rounds: int = 1,
    device: str = "cpu",
) -> list[Cost]:
    """Measure the cost of steps on networks of ``NETS``.

    SOAP is left out if its package is not installed, and Muon if torch does not have it.

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
    """Measure on one network, with a copy for each optimizer."""
    net = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = net.make().to(device)
        inputs = net.inputs().to(device)
    start = copy.deepcopy(plain.state_dict())
    copies = {optimizer: copy.deepcopy(plain) for optimizer in optimizers}
    makers = {**RIVALS, NG: lambda module: ng_optimizer(module, checkpoint)}
    stepping = {name: makers[name](copied) for name, copied in copies.items()}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def one_pass(model: nn.Module) -> float:
        """Measure a forward and backward pass, in seconds."""
        begin = now()
        model.zero_grad()
        scores = model(inputs).flatten(0, -2)
        labels = torch.arange(len(scores), device=device) % net.classes
        F.cross_entropy(scores, labels).backward()
        return now() - begin

    def steps(optimizer: str, count: int, shortest: float = 0.0) -> list[float]:
        """Measure consecutive steps from the initial weights with the same gradients."""
        trained, times = copies[optimizer], []
        trained.load_state_dict(start)
        for p, q in zip(trained.parameters(), plain.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        while len(times) < count or sum(times) < shortest:
            begin = now()
            stepping[optimizer].step()
            times.append(now() - begin)
        return times

    for model in (*copies.values(), plain):  # NGOptimizer traces its copy in a forward pass
        one_pass(model)
    for optimizer in optimizers:
        steps(optimizer, WARM_UP_OF_NG if optimizer == NG else WARM_UP)
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
    """Format the measurements as a table."""
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
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.step_cost", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--threads", type=int, help="number of CPU threads; chosen by torch if not given")
    text = "networks to measure on [gpt to small; with --memory cnn-16 to gpt2]"
    add("--nets", nargs="+", choices=list(NETS), help=text)
    text = "optimizers to compare"
    add("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS, help=text)
    add("--checkpoint", default="general", help="name or file of a learned optimizer")
    text = "number of rounds for the largest network; small ones get more"
    add("--rounds", type=int, default=1, help=text)
    add("--device", default="cpu", help="device of torch")
    text = "measure memory of NGOptimizer, and time per parameter, by network size"
    add("--memory", action="store_true", help=text)
    given = parser.parse_args(argv)

    def work() -> list[str]:
        rounds, checkpoint, device = given.rounds, given.checkpoint, given.device
        COUNT.check("rounds", rounds)
        if given.threads is not None:
            THREADS.check("threads", given.threads)
            torch.set_num_threads(given.threads)
        load_checkpoint(checkpoint)  # fails before any work if it is not one
        machine = f"torch {torch.__version__}, CPU threads: {torch.get_num_threads()}"
        if given.memory:
            if device != "cpu":
                raise ValueError(f"device: expected cpu with --memory, found '{device}'")
            found = memory.scales(given.nets or list(GROWING), checkpoint, rounds)
            return [memory.markdown(found), f"\n{machine}"]
        nets = given.nets or list(TIMED)
        costs = step_costs(nets, given.optimizers, checkpoint, rounds, device)
        note = f"Means of at least {STEPS} consecutive steps, medians over rounds; {machine}"
        return [markdown(costs), f"\n{note}"]

    return run_command("step_cost", work, stopped="stopped")
