"""One run: a task, an optimizer, a seed."""

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
from meta_train.benchmarks.strangers.task import Problem, falling, measured
from meta_train.benchmarks.strangers.tasks import find

POINTS = 100  # of a loss curve
FRACTIONS = (0.125, 0.25, 0.5, 1.0)  # of a run, at which an anytime figure is taken
NORM_BATCHES = 20  # that BatchNorm sees again where other weights are evaluated than trained


def stops(steps: int) -> list[int]:
    """Steps of a run at which it may be judged; the last is its end."""
    return [max(1, round(fraction * steps)) for fraction in FRACTIONS]


def train(run: Run, checkpoint: str = "general", root: str | None = None) -> Record:
    """Do a run and judge it, with data of a folder and the checkpoint of a learned optimizer.

    Raises:
        RuntimeError: When the checkpoint is no longer the one that the run was planned with.
    """
    if run.checkpoint and identity(checkpoint) != run.checkpoint:
        raise RuntimeError(f"checkpoint '{checkpoint}' changed since the runs were planned")
    began = time.perf_counter()
    problem = find(run.task, run.device).make(run.seed, root)
    start = measured(problem.net, problem.evaluate)  # before an optimizer follows the network
    contender = contenders(checkpoint)[run.optimizer]
    optimizers: list[Any] = contender.make(problem.net, run.rate, run.steps)
    decays = [falling(o, run.steps) for o in optimizers if contender.decays]
    # A run that diverges has no figure from there on.
    judged = [run.steps] if contender.horizon else stops(run.steps)
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
            merits[step + 1] = judge(problem, *swaps)
            if contender.is_learned:
                averaged[step + 1] = judge(problem, *(o.averaged() for o in optimizers))
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


def judge(problem: Problem, *swapped: AbstractContextManager[object]) -> float | None:
    """The figure of merit, of other weights where these are swapped in; None for no number."""
    with ExitStack() as stack:
        for swap in swapped:
            stack.enter_context(swap)
        if swapped:
            stack.enter_context(norms_renewed(problem))
        merit = measured(problem.net, problem.evaluate)
    return merit if math.isfinite(merit) else None


@contextmanager
def norms_renewed(problem: Problem) -> Iterator[None]:
    """BatchNorm's statistics of the weights in place, from training batches; then as before."""
    norms = [m for m in problem.net.modules() if isinstance(m, _BatchNorm)]
    before = [({k: v.clone() for k, v in n.state_dict().items()}, n.momentum) for n in norms]
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
            # The weights are not ours to put back: whoever swapped them in does so.
            for name, buffer in norm.named_buffers():
                buffer.copy_(state[name])
            norm.momentum = momentum
