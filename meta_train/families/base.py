"""Problems: many instances of one small training problem, worked on side by side."""

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

# How often a problem is stored in other units, and by how much.
AUGMENTED = 1 / 3
UNITS = 1e3
UNITS_OF_TENSOR = 10.0

START_BATCHES = 4  # that the typical loss at the start is the mean of


@dataclass
class Plan:
    """A family's draw: what its instances have in common, and what each of them starts from."""

    module: nn.Module  # one instance, without random numbers inside
    start: dict[str, Tensor]  # parameters, by name, [P, *shape] each
    examples: Examples  # what they are trained on
    criterion: Criterion  # (answer of one instance, what it is to be) -> loss, a mean
    # With the same parameters, where the computation of ``module`` does not show the structure.
    twin: nn.Module | None = None


def squared(answer: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return (answer - y).square().mean()


def next_tokens(answer: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of tokens, at as many of the last positions as there are targets."""
    asked = answer[:, answer.shape[1] - y.shape[1] :]
    return F.cross_entropy(asked.flatten(0, 1), y.flatten())


def losses(plan: Plan, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
    """Loss of each instance, (k P,), differentiable.

    ``parameters`` are [k P, *shape] each, k networks for each instance one after the other, and the
    batch is [P, ...] each.
    """
    names = [name for name, _ in plan.module.named_parameters()]

    def loss(values: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return plan.criterion(functional_call(plan.module, named, (x,)), y)

    copies = len(parameters[0]) // len(batch[0])
    return vmap(loss)(tuple(parameters), *(t.repeat_interleave(copies, 0) for t in batch))


class Problems:
    """Instances of one family, all of the same shapes, each with its own start and data.

    Some instances are stored in other units: parameters divided by a constant, which the loss
    multiplies them by, and the loss multiplied by another one. An optimizer is to do as well.

    Args:
        plan: What its instances have in common, and where each starts.
        dice: Random numbers that the units are drawn with.
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
        """Give parameters at the start, [P, *shape] each, as copies."""
        return [p.clone() for p in self._start]

    def batch(self, step: int) -> Batch:
        """Give the data of a step, [P, ...] each, determined by the seed and the step."""
        return self.plan.examples.batch(step)

    def loss(self, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
        """Compute the loss of each network.

        Args:
            parameters: [k P, *shape] each. Rows k p to k p + k - 1 are networks of instance p, as
                the two members of an antithetic pair, and see the same data.
            batch: A batch of ``batch(step)``.

        Returns:
            (k P,) losses, differentiable.
        """
        copies = len(parameters[0]) // self.pairs
        weights = [
            p * _beside(unit.repeat_interleave(copies, 0), p)
            for p, unit in zip(parameters, self.units.T, strict=True)
        ]
        return losses(self.plan, weights, batch) * self.loss_factor.repeat_interleave(copies, 0)

    @torch.no_grad()
    def held_out(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """Compute (k P,) losses on examples that are not trained on, or None where there are none.

        ``parameters`` are as for ``loss``.
        """
        examples = self.plan.examples.held_out
        return None if examples is None else self.loss(parameters, examples)


def _beside(unit: Tensor, parameter: Tensor) -> Tensor:
    """(n,) numbers as factors of [n, ...]."""
    return unit.view(-1, *[1] * (parameter.dim() - 1))


def _units(dice: Dice, tensors: int, augment: bool) -> tuple[Tensor, Tensor]:
    """What each tensor is stored in units of, [P, tensors], and what losses are multiplied by."""
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
    """Which parameter joins which neurons, from following one instance through a batch."""
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
