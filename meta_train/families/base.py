"""Problems: many instances of one small training problem, trained in parallel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from l2o_graph.layout.spec import NetSpec
from l2o_graph.tracing import spec_of_computation
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, Examples

Criterion = Callable[[Tensor, Tensor], Tensor]

# Probability that a problem has other units, and the largest factors of units.
AUGMENTED = 1 / 3
UNITS = 1e3
UNITS_OF_TENSOR = 10.0

START_BATCHES = 4  # number of batches for the loss at the start


@dataclass
class Plan:
    """Problem drawn from a family: the common parts of its instances, and their initial weights."""

    module: nn.Module  # network of one instance, deterministic
    start: dict[str, Tensor]  # initial parameters by name, [P, *shape] each
    examples: Examples  # training data
    criterion: Criterion  # (outputs of one instance, targets) -> mean loss
    # Module with the same parameters that shows the structure, if ``module`` itself does not.
    twin: nn.Module | None = None


def squared(answer: Tensor, y: Tensor) -> Tensor:
    """Compute the mean squared error."""
    return (answer - y).square().mean()


def next_tokens(answer: Tensor, y: Tensor) -> Tensor:
    """Compute the cross-entropy of tokens at the last positions, as many as there are targets."""
    asked = answer[:, answer.shape[1] - y.shape[1] :]
    return F.cross_entropy(asked.flatten(0, 1), y.flatten())


def losses(plan: Plan, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
    """Compute the loss of each network, (k P,), differentiable.

    ``parameters`` are [k P, *shape] each, with k consecutive networks for each instance, and the
    batch is [P, ...] each.
    """
    names = [name for name, _ in plan.module.named_parameters()]

    def loss(values: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return plan.criterion(functional_call(plan.module, named, (x,)), y)

    copies = len(parameters[0]) // len(batch[0])
    return vmap(loss)(tuple(parameters), *(t.repeat_interleave(copies, 0) for t in batch))


class Problems:
    """Instances of one family, all of the same shapes, each with its own initial weights and data.

    Some instances have other units: parameters are divided by a constant, by which the loss
    multiplies them, and the loss is multiplied by another constant. An optimizer should do equally
    well on them.

    Args:
        plan: Problem to make instances of.
        dice: Random numbers for the units.
        augment: Whether to change units at all.
    """

    def __init__(self, plan: Plan, dice: Dice, augment: bool = True):
        self.plan = plan
        self.spec: NetSpec = _spec(plan)
        self.shapes: tuple[tuple[int, ...], ...] = self.spec.shapes
        self.pairs: int = dice.pairs
        self.units, self.loss_factor = _units(dice, len(self.shapes), augment)
        parameters = [plan.start[name] for name in self.spec.names]
        self._start = [
            p / _beside(unit, p) for p, unit in zip(parameters, self.units.T, strict=True)
        ]
        with torch.no_grad():
            at_start = [self.loss(self._start, self.batch(step)) for step in range(START_BATCHES)]
        self.scale: Tensor = torch.stack(at_start).mean(0).clamp(min=1e-12)

    def start(self) -> list[Tensor]:
        """Return copies of the initial parameters, [P, *shape] each."""
        return [p.clone() for p in self._start]

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, [P, ...] each, determined by the seed and the step."""
        return self.plan.examples.batch(step)

    def loss(self, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
        """Compute the loss of each network.

        Args:
            parameters: Parameters, [k P, *shape] each. Rows k p to k p + k - 1 are networks of
                instance p, such as the two of an antithetic pair, with the same data.
            batch: Result of ``batch(step)``.

        Returns:
            Losses, (k P,), differentiable.
        """
        copies = len(parameters[0]) // self.pairs
        weights = [
            p * _beside(unit.repeat_interleave(copies, 0), p)
            for p, unit in zip(parameters, self.units.T, strict=True)
        ]
        return losses(self.plan, weights, batch) * self.loss_factor.repeat_interleave(copies, 0)

    @torch.no_grad()
    def held_out(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """Compute (k P,) losses on held-out examples; None if there are none.

        ``parameters`` are as for ``loss``.
        """
        examples = self.plan.examples.held_out
        return None if examples is None else self.loss(parameters, examples)


def _beside(unit: Tensor, parameter: Tensor) -> Tensor:
    """View (n,) numbers as factors of [n, ...]."""
    return unit.view(-1, *[1] * (parameter.dim() - 1))


def _units(dice: Dice, tensors: int, augment: bool) -> tuple[Tensor, Tensor]:
    """Draw the unit of each tensor, [P, tensors], and the factor of losses, [P]."""
    if not augment:
        return torch.ones(dice.pairs, tensors), torch.ones(dice.pairs)
    dice = dice.other("units")
    changed, also_apart = dice.uniform(1) < AUGMENTED, dice.uniform(1) < 0.5
    one = dice.log_uniform(1 / UNITS, UNITS, 1)
    apart = dice.log_uniform(1 / UNITS_OF_TENSOR, UNITS_OF_TENSOR, tensors)
    units = torch.where(changed, one * torch.where(also_apart, apart, 1.0), 1.0)
    rescaled, factor = dice.uniform() < AUGMENTED, dice.log_uniform(1 / UNITS, UNITS)
    return units, torch.where(rescaled, factor, 1.0)


def _spec(plan: Plan) -> NetSpec:
    """Compute the specification, from a call of one instance."""
    x, _ = plan.examples.batch(0)
    spec = spec_of_computation(plan.twin or plan.module, (x[0],))
    own = [(name, tuple(p.shape)) for name, p in plan.module.named_parameters()]
    if own != list(zip(spec.names, spec.shapes, strict=True)):
        raise ValueError("twin: expected the parameters of the module, found others")
    for name, shape in own:
        found = tuple(plan.start[name].shape[1:])
        if found != shape:
            raise ValueError(f"start: expected '{name}' of shape {shape}, found {found}")
    return spec
