"""What a step of NGOptimizer takes as networks grow: the graph, time per parameter, memory.

    python -m meta_train.scaling --threads 2

Each network is trained for a few steps on noise in a process of its own, whose resident memory is
read from Linux. Time does not depend on what the gradients are.
"""

import argparse
import gc
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from tqdm import tqdm

from l2o_graph import NGOptimizer
from l2o_graph.commands import run_command
from l2o_graph.optim.checkpoints import load_checkpoint
from l2o_graph.ranges import COUNT, THREADS
from meta_train.benchmarks.report import table
from meta_train.benchmarks.strangers.networks import GPT, mlp
from meta_train.tasks.image_classification import cnn

MEMORY, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIGABYTE = 1e9


def gpt2(words: int = 50257, tokens: int = 1024, width: int = 768, blocks: int = 12) -> GPT:
    """A decoder of the shape of GPT-2 small, 124 M parameters; the head is the embedding."""
    net = GPT(words, tokens, width, blocks, width // 64)
    net.head.weight = net.word.weight
    return net


@dataclass(frozen=True, slots=True)
class Case:
    """A network to measure on, and a batch for it."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Tensor]


def _cnn(width: int) -> Case:
    return Case(lambda: cnn(3, 32, width), lambda: torch.randn(4, 3, 32, 32))


# The paper's CIFAR-10 network is the CNN of width 32.
CASES = {
    **{f"CNN, width {width}": _cnn(width) for width in (16, 32, 64, 128, 256, 512, 1024)},
    "MLP, width 1024": Case(lambda: mlp(784, 1024, 1024, 1024, 10), lambda: torch.randn(4, 784)),
    "resnet18": Case(resnet18, lambda: torch.randn(2, 3, 64, 64)),
    "GPT-2 small": Case(gpt2, lambda: torch.randint(0, 50257, (1, 8))),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """What came of a network.

    Attributes:
        name: A key of ``CASES``.
        parameters: Scalars in all.
        graph_seconds: To build the graph, once.
        step_seconds: Median of a step.
        given: Bytes resident before the first step: torch, the network and its gradients.
        kept: Bytes more between steps: the state.
        workspace: Bytes more than both at the worst moment of a step.
    """

    name: str
    parameters: int
    graph_seconds: float
    step_seconds: float
    given: int
    kept: int
    workspace: int


def measure(name: str, checkpoint: str, steps: int, threads: int | None) -> Scale:
    """Measure one network, in a process that has done nothing else.

    Raises:
        OSError: Where the system is not Linux.
    """
    if threads:
        torch.set_num_threads(threads)
    net, x = CASES[name].make(), CASES[name].batch()
    opt = NGOptimizer(net.parameters(), model=net, checkpoint=checkpoint)
    begin = time.perf_counter()
    opt.read_structure((x,))
    graph_seconds = time.perf_counter() - begin
    net(x).square().mean().backward()
    gc.collect()
    given, peak, seconds = _memory("VmRSS"), 0, []
    for _ in range(steps):
        RESET.write_text("5")  # forget the highest so far
        begin = time.perf_counter()
        opt.step()
        seconds.append(time.perf_counter() - begin)
        peak = max(peak, _memory("VmHWM"))
    state = sum(
        t.numel() * t.element_size()
        for entries in opt.state.values()
        for t in entries.values()
        if isinstance(t, Tensor)
    )
    count = sum(p.numel() for p in net.parameters())
    # The first step makes the state and, on small networks, whatever is made once.
    middle = median(seconds[1:] or seconds)
    return Scale(name, count, graph_seconds, middle, given, state, peak - given - state)


def measure_all(
    names: Sequence[str],
    checkpoint: str = NGOptimizer.packaged,
    steps: int = 3,
    threads: int | None = None,
) -> list[Scale]:
    """Measure networks, each in a new process.

    Raises:
        ValueError: For an unknown name, fewer than one step or thread, and a checkpoint that does
            not load.
        OSError: Where the system is not Linux.
    """
    COUNT.check("steps", steps)
    if threads is not None:
        THREADS.check("threads", threads)
    for name in names:
        if name not in CASES:
            raise ValueError(f"unknown network '{name}', expected one of {sorted(CASES)}")
    if not RESET.exists():
        raise OSError(f"expected Linux, whose {RESET} forgets a process's highest memory")
    load_checkpoint(checkpoint)  # that it can be is seen before any work
    scales = []
    for name in tqdm(names, unit="network"):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            scales.append(pool.submit(measure, name, checkpoint, steps, threads).result())
    return scales


def markdown(scales: Sequence[Scale]) -> str:
    """The measurements as a table."""
    head = ["network", "parameters", "graph, s", "step, s", "ns a parameter",
            "model and gradients, GB", "state, GB", "workspace, GB"]  # fmt: skip
    rows = [
        [
            s.name, f"{s.parameters:,}", f"{s.graph_seconds:.2f}", f"{s.step_seconds:.3g}",
            f"{1e9 * s.step_seconds / s.parameters:.0f}",
            *(f"{size / GIGABYTE:.2f}" for size in (s.given, s.kept, s.workspace)),
        ]
        for s in scales
    ]  # fmt: skip
    return table([head, *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print; 0 when all is done, 2 for a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.scaling", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--networks", nargs="+", default=list(CASES), metavar="NETWORK")
    parser.add_argument("--checkpoint", default=NGOptimizer.packaged, help="a name or a path")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice if not given")
    given = parser.parse_args(argv)

    def work() -> list[str]:
        scales = measure_all(given.networks, given.checkpoint, given.steps, given.threads)
        threads = given.threads or torch.get_num_threads()
        return [markdown(scales), f"\ntorch {torch.__version__}, CPU threads: {threads}"]

    return run_command("scaling", work, stopped="stopped")


def _memory(field: str) -> int:
    """Bytes that Linux says this process has, or has had at most, resident."""
    found = re.search(rf"{field}:\s*(\d+) kB", MEMORY.read_text())
    if found is None:
        raise OSError(f"expected {field} in {MEMORY}, found none")
    return 1024 * int(found[1])
