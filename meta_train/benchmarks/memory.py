"""Memory of NGOptimizer, and time of a step, for networks of growing size.

Each network is trained for a few steps on noise in its own process, whose resident memory is read
from Linux.
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

from meta_train.benchmarks.contenders import ng_optimizer
from meta_train.benchmarks.nets import NETS
from meta_train.benchmarks.report import table

MEMORY, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Scale:
    """Measurements of a network; memory is in bytes."""

    label: str
    parameters: int  # number of parameters
    graph_seconds: float  # time to build the graph, once
    step_seconds: float  # median time of a step
    given: int  # resident memory before the first step: torch, the network and its gradients
    kept: int  # memory of the optimizer's state
    workspace: int  # additional memory at the peak of a step


def scales(nets: Sequence[str], checkpoint: str, rounds: int) -> list[Scale]:
    """Measure networks of ``NETS``, each in a new process, for ``rounds`` + 1 steps.

    Raises:
        OSError: If the system is not Linux.
    """
    if not RESET.exists():
        raise OSError(f"expected Linux, whose {RESET} resets the peak memory of a process")
    work = partial(_measured, checkpoint, rounds, torch.get_num_threads())
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return list(tqdm(pool.imap(work, nets), total=len(nets), unit="network"))


def _measured(checkpoint: str, rounds: int, threads: int, name: str) -> Scale:
    """Measure one network, in a new process."""
    torch.set_num_threads(threads)
    net, x = NETS[name].make(), NETS[name].inputs()
    opt = ng_optimizer(net, checkpoint)
    begin = time.perf_counter()
    opt.read_structure((x,))
    graph_seconds = time.perf_counter() - begin
    net(x).square().mean().backward()
    gc.collect()
    given, peak, seconds = _memory("VmRSS"), 0, []
    for _ in range(1 + rounds):
        RESET.write_text("5")  # reset the peak
        begin = time.perf_counter()
        opt.step()
        seconds.append(time.perf_counter() - begin)
        peak = max(peak, _memory("VmHWM"))
    tensors = [t for own in opt.state.values() for t in own.values() if isinstance(t, Tensor)]
    state = sum(t.numel() * t.element_size() for t in tensors)
    count = sum(p.numel() for p in net.parameters())
    # The first step also creates the state.
    middle = median(seconds[1:])
    return Scale(NETS[name].label, count, graph_seconds, middle, given, state, peak - given - state)


def _memory(field: str) -> int:
    """Read a size in bytes of this process: "VmRSS" is resident, "VmHWM" its peak."""
    found = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
    return 1024 * int(found[field].removesuffix("kB"))


def markdown(scales: Sequence[Scale]) -> str:
    """Format the measurements as a table."""
    head = ["network", "parameters", "graph, s", "step, s", "ns a parameter",
            "model and gradients, GB", "state, GB", "workspace, GB"]  # fmt: skip
    rows = [
        [
            s.label, f"{s.parameters:,}", f"{s.graph_seconds:.2f}", f"{s.step_seconds:.3g}",
            f"{1e9 * s.step_seconds / s.parameters:.0f}",
            *(f"{size / 1e9:.2f}" for size in (s.given, s.kept, s.workspace)),
        ]
        for s in scales
    ]  # fmt: skip
    return table([head, *rows])
