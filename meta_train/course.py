"""Courses: training runs that evolution strategies evaluate span by span.

A course is the training of many networks of one family, an antithetic pair for each instance: one
network under the controller plus a perturbation, one under the controller minus it. A span gives
the losses of all networks, and the next span continues from its end.
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

# Losses relative to the start are capped at this.
MOST_LOSS = 2.0
# Added to relative losses, so that far below it there is little more to gain.
LEAST_LOSS = 1e-5
# Number of steps over which losses are averaged before the logarithm.
WINDOW = 10
# Number of steps between evaluations on held-out examples.
EVALUATE_EVERY = 20
# Number of batches for the loss of averaged parameters.
BATCHES_OF_AVERAGES = 4


@dataclass(frozen=True, slots=True)
class Draw:
    """Parameters that determine a course."""

    family: str
    seed: int  # seed of instances and perturbations
    length: int  # number of steps
    told: bool  # whether the rule gets the length, as with ``total_steps``


@dataclass(eq=False)
class Course:
    """Networks of one family in training: 2P of them for P instances."""

    draw: Draw
    problems: Problems  # instances of the family
    memory: Memory  # state of the rule, (2P, ...)
    parameters: list[Tensor]  # parameters of each stack, (2P, M, r, c)
    offsets: list[Tensor]  # offsets of each stack, see ``averaging``, (2P, M, r, c)
    age: int = 0  # number of steps so far

    @property
    def ended(self) -> bool:
        """Whether the course has reached its length."""
        return self.age >= self.draw.length

    def span(self, config: ControllerConfig, weights: Weights, steps: int) -> Tensor:
        """Train for ``steps`` steps, or to the end, under 2P controllers.

        Returns (windows + 1, 2P) losses relative to the start: means over windows of training
        steps, or evaluations on held-out examples if the family has any. The last one is that of
        the averaged parameters at the end.
        """
        learned = Learned.of(config, weights)
        length = self.draw.length
        steps = min(steps, length - self.age)
        networks = 2 * self.problems.pairs
        parameters = sum(map(math.prod, self.problems.shapes))  # of one network
        horizon = torch.full((networks,), float(length)) if self.draw.told else None
        scale = self.problems.scale.repeat_interleave(2, 0)
        losses, evaluations = [], []
        for step in range(self.age, self.age + steps):
            loss, gradients = self._gradients(step)
            losses.append(loss)
            with torch.no_grad():
                few = self.problems.plan.examples.few(step, parameters)
                updates, _ = advance(learned, self.memory, gradients, self.parameters, horizon, few)
                follow(self.parameters, self.offsets, updates, step)
            if (step + 1) % EVALUATE_EVERY == 0:
                held_out = self.problems.held_out(self._flat(self.parameters))
                evaluations += [] if held_out is None else [held_out]
        self.age += steps
        found = evaluations or [part.mean(0) for part in torch.stack(losses).split(WINDOW)]
        found.append(self._of_averages())
        relative = torch.nan_to_num(torch.stack(found) / scale, nan=math.inf)
        return relative.clamp(max=MOST_LOSS)

    def _flat(self, stacks: list[Tensor]) -> list[Tensor]:
        """Arrange stacks as parameters of the family, (2P, *shape) each."""
        found = scattered(self.memory, stacks)
        return [found[i].view(-1, *shape) for i, shape in enumerate(self.problems.shapes)]

    def _gradients(self, step: int) -> tuple[Tensor, list[Tensor]]:
        """Compute losses of all networks on the batch of a step, (2P,), and gradients by stack."""
        leaves = [p.detach().requires_grad_() for p in self._flat(self.parameters)]
        with torch.enable_grad():
            loss = self.problems.loss(leaves, self.problems.batch(step))
            gradients = torch.autograd.grad(loss.sum(), leaves)
        return loss.detach(), gathered(self.memory, fit([g.flatten(1) for g in gradients]))

    @torch.no_grad()
    def _of_averages(self) -> Tensor:
        """Compute the loss of the averaged parameters, (2P,), on held-out or future batches."""
        parameters = self._flat(averages_of(self.parameters, self.offsets, self.age))
        held_out = self.problems.held_out(parameters)
        if held_out is not None:
            return held_out
        steps = range(self.age, self.age + BATCHES_OF_AVERAGES)
        losses = [self.problems.loss(parameters, self.problems.batch(step)) for step in steps]
        return torch.stack(losses).mean(0)


def fit(gradients: list[Tensor]) -> list[Tensor]:
    """Replace gradients, (2P, size) each, of diverged networks by zeros, so that eigh succeeds."""
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in gradients]).amax(0)
    # False for NaN.
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
    """Start a course of ``length`` steps, which the rule knows if ``told``.

    See ``meta_train.families.draw`` for the other arguments.
    """
    problems = draw(family, seed, pairs, mine, validation, data_root)
    memory = arrange(problems.spec, blocks_of(problems.spec), 2 * problems.pairs)
    both = [p.repeat_interleave(2, 0).flatten(1) for p in problems.start()]
    parameters = [p.contiguous() for p in gathered(memory, both)]
    offsets = [torch.zeros_like(p) for p in parameters]
    return Course(Draw(family, seed, length, told), problems, memory, parameters, offsets)


def score(losses: Tensor) -> Tensor:
    """Compute the score of a span from its losses, (windows + 1, 2P) -> (2P,).

    It is half the mean logarithm of the losses, plus half that of the averaged parameters' loss.
    """
    logs = (losses + LEAST_LOSS).log()
    return (logs[:-1].mean(0) + logs[-1]) / 2


def tensors_of_course(course: Course) -> dict[str, Tensor]:
    """Return all tensors of a course's state, by name."""
    history = course.memory.history
    found = {"rows": history.rows, "tensors": history.tensors, "ages": history.ages}
    for s, (stack, p) in enumerate(zip(course.memory.stacks, course.parameters, strict=True)):
        found |= {f"{s}.{name}": t for name, t in stack.owned().items()}
        found |= {f"{s}.parameter": p, f"{s}.offset": course.offsets[s]}
    return found


def restore_course(course: Course, age: int, tensors: dict[str, Tensor]) -> None:
    """Set the state of a course that was just started."""
    course.age = age
    for stack in course.memory.stacks:
        stack.age = age
    for name, tensor in tensors_of_course(course).items():
        copy_in(tensor, tensors, name)
