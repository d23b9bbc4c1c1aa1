"""Runs of training that evolution strategies judge, in spans of so many steps.

A course is many networks of one family in training, two to an instance: an antithetic pair, under
controllers that differ from the present one by a perturbation and by its negative. A span gives
each network's loss; the state at its end is where the next one goes on.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from l2o_graph.optim.averaging import averages_of, follow
from l2o_graph.optim.base import LONGEST_GRADIENT
from l2o_graph.optim.blocks import blocks_of
from l2o_graph.optim.controller import ControllerConfig, Learned, Weights
from l2o_graph.optim.memory import Memory, arrange, gathered, scattered
from l2o_graph.optim.step import advance
from meta_train.families.base import Problems
from meta_train.families.registry import draw
from meta_train.run import copy_in

# Losses count up to this many times that of the start: beyond it is all the same.
MOST_LOSS = 2.0
# Added to losses relative to the start: well below it there is little more to be gained.
LEAST_LOSS = 1e-5
# Losses are averaged over so many steps before their logarithm is taken.
WINDOW = 10
# Steps between two looks at held-out examples.
LOOK_EVERY = 20
# Batches that averaged parameters are judged on.
BATCHES_OF_AVERAGES = 4


@dataclass(frozen=True, slots=True)
class Draw:
    """What determines a course."""

    family: str
    seed: int  # of its instances and perturbations
    length: int  # in steps
    told: bool  # whether its networks are told their length


@dataclass(eq=False)
class Course:
    """Networks of one family in training."""

    draw: Draw  # what determines it
    problems: Problems  # that they are trained on
    memory: Memory  # of the rule of them, (2P, ...)
    parameters: list[Tensor]  # of each stack, (2P, M, r, c)
    offsets: list[Tensor]  # how far ahead of its average each is led, likewise: see ``averaging``
    age: int = 0  # number of steps so far

    @property
    def ended(self) -> bool:
        """Whether it has reached its length."""
        return self.age >= self.draw.length

    def span(self, config: ControllerConfig, weights: Weights, steps: int) -> Tensor:
        """Train for so many steps, or to the end, under 2P controllers.

        Returns (windows, 2P) losses relative to the start, each a mean over some steps, on training
        batches or on held-out examples, as the family is judged; the last is that of the averaged
        parameters at the end.
        """
        learned = Learned.of(config, weights)
        length = self.draw.length
        steps = min(steps, length - self.age)
        networks = 2 * self.problems.pairs
        horizon = torch.full((networks,), float(length)) if self.draw.told else None
        scale = self.problems.scale.repeat_interleave(2, 0)
        losses, looks = [], []
        for step in range(self.age, self.age + steps):
            loss, gradients = self._gradients(step)
            losses.append(loss)
            with torch.no_grad():
                few = self.problems.plan.examples.few(step)
                updates, _ = advance(learned, self.memory, gradients, self.parameters, horizon, few)
                follow(self.parameters, self.offsets, updates, step)
            if (step + 1) % LOOK_EVERY == 0:
                held_out = self.problems.held_out(self._flat(self.parameters))
                looks += [] if held_out is None else [held_out]
        self.age += steps
        found = looks or [part.mean(0) for part in torch.stack(losses).split(WINDOW)]
        found.append(self._of_averages())
        relative = torch.nan_to_num(torch.stack(found) / scale, nan=math.inf)
        return relative.clamp(max=MOST_LOSS)

    def _flat(self, stacks: list[Tensor]) -> list[Tensor]:
        """Parameters as the family has them, (2P, *shape) each."""
        found = scattered(self.memory, stacks)
        return [found[i].view(-1, *shape) for i, shape in enumerate(self.problems.shapes)]

    def _gradients(self, step: int) -> tuple[Tensor, list[Tensor]]:
        """Losses of all networks on the batch of a step, (2P,), and their gradients by stacks."""
        leaves = [p.detach().requires_grad_() for p in self._flat(self.parameters)]
        with torch.enable_grad():
            loss = self.problems.loss(leaves, self.problems.batch(step))
            gradients = torch.autograd.grad(loss.sum(), leaves)
        return loss.detach(), gathered(self.memory, fit([g.flatten(1) for g in gradients]))

    @torch.no_grad()
    def _of_averages(self) -> Tensor:
        """Loss of the averaged parameters, (2P,), on batches that are still to come."""
        parameters = self._flat(averages_of(self.parameters, self.offsets, self.age))
        held_out = self.problems.held_out(parameters)
        if held_out is not None:
            return held_out
        steps = range(self.age, self.age + BATCHES_OF_AVERAGES)
        losses = [self.problems.loss(parameters, self.problems.batch(step)) for step in steps]
        return torch.stack(losses).mean(0)


def fit(gradients: list[Tensor]) -> list[Tensor]:
    """Gradients, (2P, size) each, zeros for lost networks: no decomposition ends with NaN."""
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in gradients]).amax(0)
    # Written so that NaN answers no.
    is_fit = (norms <= LONGEST_GRADIENT)[:, None]
    return [torch.where(is_fit, g, 0.0) for g in gradients]


def start(
    family: str,
    seed: int,
    pairs: int,
    length: int,
    told: bool,
    mine: slice = slice(None),
    validation: bool = False,
    data_root: str | Path | None = None,
) -> Course:
    """Begin a course of so many steps: see ``meta_train.families.draw`` for the other arguments.

    Its networks are told the length, or not.
    """
    problems = draw(family, seed, pairs, mine, validation, data_root)
    memory = arrange(problems.spec, blocks_of(problems.spec), 2 * problems.pairs)
    both = [p.repeat_interleave(2, 0).flatten(1) for p in problems.start()]
    parameters = [p.contiguous() for p in gathered(memory, both)]
    offsets = [torch.zeros_like(p) for p in parameters]
    return Course(Draw(family, seed, length, told), problems, memory, parameters, offsets)


def score(losses: Tensor) -> Tensor:
    """What a span is judged by, (windows + 1, 2P) -> (2P,).

    The mean of the logarithms of its losses, and of the averaged parameters' at its end.
    """
    logs = (losses + LEAST_LOSS).log()
    return (logs[:-1].mean(0) + logs[-1]) / 2


def tensors_of_course(course: Course) -> dict[str, Tensor]:
    """All that changes in a course."""
    history = course.memory.history
    found = {"rows": history.rows, "tensors": history.tensors, "ages": history.ages}
    for s, (stack, p) in enumerate(zip(course.memory.stacks, course.parameters, strict=True)):
        found |= {f"{s}.{name}": t for name, t in stack.owned().items()}
        found |= {f"{s}.parameter": p, f"{s}.offset": course.offsets[s]}
    return found


def restore_course(course: Course, age: int, tensors: dict[str, Tensor]) -> None:
    """Bring a course that was just started to where another one was."""
    course.age = age
    for stack in course.memory.stacks:
        stack.age = age
    for name, tensor in tensors_of_course(course).items():
        copy_in(tensor, tensors, name)
