"""One ordinary training run with one of the contenders, timed step by step."""

import time
from contextlib import ExitStack

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from l2o_graph import NGOptimizer
from meta_train.benchmarks.baselines import Contender
from meta_train.tasks import Problem


class Training:
    """A network on its way; each call of :meth:`step` trains it on the next batch.

    Args:
        problem: The network and its batches.
        contender: What trains it.
        rate: Learning rate, at the start where it decays.
        steps: Number of steps that there will be.

    Attributes:
        losses: Before each step, on its batch, in nats.
        step_seconds: Seconds of each step: batch, forward, backward and update.
        update_seconds: Seconds of each update.
    """

    def __init__(self, problem: Problem, contender: Contender, rate: float, steps: int):
        self.problem = problem
        self.optimizers = contender.make(problem.module, rate, steps)
        self._averaged = contender.averaged
        self._decays = [_linear(o, steps) for o in self.optimizers if contender.decays]
        self._parameters = list(problem.module.parameters())
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.update_seconds: list[float] = []

    def step(self) -> float:
        """Train on the next batch; returns the loss on it, before the update."""
        start = time.perf_counter()
        for p in self._parameters:
            p.grad = None
        loss = self.problem.loss(self._parameters, self.problem.batch(len(self.losses)))
        loss.backward()
        value = loss.item()
        before = self._now()
        for optimizer in self.optimizers:
            optimizer.step()
        end = self._now()
        for decay in self._decays:
            decay.step()
        self.losses.append(value)
        self.update_seconds.append(end - before)
        self.step_seconds.append(end - start)
        return value

    def accuracy(self, averaged: bool | None = None) -> float:
        """On the test set, in [0, 1].

        Args:
            averaged: Whether of averaged weights, where there are any; None as the contender has
                it.
        """
        averaged = self._averaged if averaged is None else averaged
        with ExitStack() as weights:
            for optimizer in self.optimizers:
                if averaged and isinstance(optimizer, NGOptimizer):
                    weights.enter_context(optimizer.averaged())
            return self.problem.accuracy(self._parameters)

    def _now(self) -> float:
        if self._parameters[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _linear(optimizer: Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda t: 1 - t / steps)
