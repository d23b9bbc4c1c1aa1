"""What a step of NGOptimizer takes of memory, and how its time grows with the network.

Each network is trained for a few steps on noise in a process of its own, whose resident memory is
read from Linux.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from meta_train.benchmarks.contenders import made
from meta_train.benchmarks.nets import NETS
from meta_train.benchmarks.report import table

MEMORY, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIGABYTE = 1e9


@dataclass(frozen=True, slots=True)
class Scale:
    """What came of a network; memory is in bytes."""

    label: str
    parameters: int
    graph_seconds: float  # to build the graph, once
    step_seconds: float  # median of a step
    given: int  # resident before the first step: torch, the network and its gradients
    kept: int  # more between steps: the state
    workspace: int  # more than both at the worst moment of a step


def scales(nets: Sequence[str], checkpoint: str, rounds: int) -> list[Scale]:
    """Measure networks of ``NETS``, each in a new process, for one step more than ``rounds``.

    Raises:
        OSError: Where the system is not Linux.
    """
    if not RESET.exists():
        raise OSError(f"expected Linux, whose {RESET} forgets a process's highest memory")
    work = partial(_measured, checkpoint, rounds, torch.get_num_threads())
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return list(tqdm(pool.imap(work, nets), total=len(nets), unit="network"))


def _measured(checkpoint: str, rounds: int, threads: int, name: str) -> Scale:
    """Measure one network, in a process that has done nothing else."""
    torch.set_num_threads(threads)
    net, x = NETS[name].make(), NETS[name].inputs()
    opt = made(net, checkpoint)
    begin = time.perf_counter()
    opt.read_structure((x,))
    graph_seconds = time.perf_counter() - begin
    net(x).square().mean().backward()
    gc.collect()
    given, peak, seconds = _memory("VmRSS"), 0, []
    for _ in range(1 + rounds):
        RESET.write_text("5")  # forget the highest so far
        begin = time.perf_counter()
        opt.step()
        seconds.append(time.perf_counter() - begin)
        peak = max(peak, _memory("VmHWM"))
    tensors = [t for own in opt.state.values() for t in own.values() if isinstance(t, Tensor)]
    state = sum(t.numel() * t.element_size() for t in tensors)
    count = sum(p.numel() for p in net.parameters())
    # The first step makes the state and, on small networks, whatever is made once.
    middle = median(seconds[1:])
    return Scale(NETS[name].label, count, graph_seconds, middle, given, state, peak - given - state)


def _memory(field: str) -> int:
    """Bytes that Linux says this process has, or has had at most, resident."""
    found = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
    return 1024 * int(found[field].removesuffix("kB"))


def markdown(scales: Sequence[Scale]) -> str:
    """The measurements as a table."""
    head = ["network", "parameters", "graph, s", "step, s", "ns a parameter",
            "model and gradients, GB", "state, GB", "workspace, GB"]  # fmt: skip
    rows = [
        [
            s.label, f"{s.parameters:,}", f"{s.graph_seconds:.2f}", f"{s.step_seconds:.3g}",
            f"{1e9 * s.step_seconds / s.parameters:.0f}",
            *(f"{size / GIGABYTE:.2f}" for size in (s.given, s.kept, s.workspace)),
        ]
        for s in scales
    ]  # fmt: skip
    return table([head, *rows])
