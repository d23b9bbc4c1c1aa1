"""One run of the benchmark: a task, an optimizer and a seed."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import datetime, timezone
from statistics import fmean, median
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from meta_train.benchmarks.contenders import contenders, identity
from meta_train.benchmarks.records import Record, Run
from meta_train.benchmarks.strangers.task import Problem, linear_decay
from meta_train.benchmarks.strangers.tasks import find

POINTS = 100  # maximal number of points of a loss curve
FRACTIONS = (0.125, 0.25, 0.5, 1.0)  # of a run, after which it is evaluated
NORM_BATCHES = 20  # number of batches for new statistics of BatchNorm


def stops(steps: int) -> list[int]:
    """Return the numbers of steps after which a run is evaluated; the last is its end."""
    return [max(1, round(fraction * steps)) for fraction in FRACTIONS]


def train(run: Run, checkpoint: str = "general", root: str | None = None) -> Record:
    """Carry out a run.

    Args:
        run: Run to carry out.
        checkpoint: Name or file of a learned optimizer.
        root: Folder of datasets; "sample" for the packaged sample.

    Raises:
        RuntimeError: If the checkpoint has other weights than those of the run.
    """
    if run.checkpoint and identity(checkpoint) != run.checkpoint:
        raise RuntimeError(f"checkpoint '{checkpoint}' changed since the runs were planned")
    began = time.perf_counter()
    problem = find(run.task, run.device).make(run.seed, root)
    start = problem.merit()  # before NGOptimizer adds hooks to the network
    contender = contenders(checkpoint)[run.optimizer]
    optimizers: list[Any] = contender.make(problem.net, run.rate, run.steps)
    decays = [linear_decay(o, run.steps) for o in optimizers if contender.decays]
    # A run that diverges has no later figures.
    judged = [run.steps] if contender.depends_on_length else stops(run.steps)
    merits: dict[int, float | None] = dict.fromkeys(judged)
    averaged = dict(merits) if contender.is_learned else {}
    losses: list[float] = []
    passes: list[float] = []
    updates: list[float] = []
    for step in range(run.steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        batch = problem.batch(step)
        ready = time.perf_counter()
        loss = problem.loss(problem.net, batch)
        loss.backward()
        value = loss.item()
        passed = time.perf_counter()
        if not math.isfinite(value):
            break
        for optimizer in optimizers:
            optimizer.step()
        if run.device.startswith("cuda"):
            torch.cuda.synchronize()
        updates.append(time.perf_counter() - passed)
        for decay in decays:
            decay.step()
        passes.append(passed - ready)
        losses.append(value)
        if step + 1 in judged:
            swaps = [contender.swap(o) for o in optimizers] if contender.swap else []
            merits[step + 1] = evaluate(problem, *swaps)
            if contender.is_learned:
                averaged[step + 1] = evaluate(problem, *(o.averaged() for o in optimizers))
    width = max(1, -(-len(losses) // POINTS))
    return Record(
        run=run,
        start=start,
        merits=merits,
        averaged=averaged,
        curve=[fmean(losses[i : i + width]) for i in range(0, len(losses), width)],
        diverged=len(losses) < run.steps,
        pass_seconds=median(passes) if passes else 0.0,
        update_seconds=median(updates) if updates else 0.0,
        update_seconds_mean=fmean(updates) if updates else 0.0,
        seconds=time.perf_counter() - began,
        torch=str(torch.__version__),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def evaluate(problem: Problem, *swaps: AbstractContextManager[object]) -> float | None:
    """Compute the figure of merit; return None if it is not finite.

    Args:
        problem: Problem with the trained network.
        swaps: Contexts in which the network has other weights, such as averaged ones.
    """
    with ExitStack() as stack:
        for swap in swaps:
            stack.enter_context(swap)
        if swaps:
            stack.enter_context(new_norm_statistics(problem))
        merit = problem.merit()
    return merit if math.isfinite(merit) else None


@contextmanager
def new_norm_statistics(problem: Problem) -> Iterator[None]:
    """Compute BatchNorm's running statistics for the current weights; restore them afterwards."""
    norms = [m for m in problem.net.modules() if isinstance(m, _BatchNorm)]
    before = [({k: v.clone() for k, v in n.named_buffers()}, n.momentum) for n in norms]
    if norms:
        with torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over all batches
            for step in range(NORM_BATCHES):
                problem.loss(problem.net, problem.batch(step))
    try:
        yield
    finally:
        for norm, (state, momentum) in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(state[name])
            norm.momentum = momentum
