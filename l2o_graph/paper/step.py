"""A step as a pure function: (parameters, gradients, state) -> (updates, new state).

``PaperOptimizer.step`` applies its result, and the meta-trainer differentiates it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o_graph.layout.blocks import topology_of
from l2o_graph.layout.spec import CONSTANTS, NetSpec
from l2o_graph.paper.features import (
    MOMENTUM_DECAYS,
    next_momenta,
    raw_numbers,
    zero_momenta,
)
from l2o_graph.paper.rule import UpdateRule


@dataclass(frozen=True, slots=True)
class State:
    """State of one parameter.

    Attributes:
        momenta: (5, *shape), float32, or float64 for a parameter in float64.
        step: Number of updates so far, 0-dimensional.
    """

    momenta: Tensor
    step: Tensor

    @staticmethod
    def fresh(parameter: Tensor) -> "State":
        """Create the state before the first gradient."""
        momenta = zero_momenta(parameter)
        return State(momenta, momenta.new_zeros(()))


def update(
    rule: UpdateRule,
    spec: NetSpec,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    state: Sequence[State],
    through_time: bool = False,
) -> tuple[list[Tensor], list[State]]:
    """Compute one step, differentiable in the rule's weights.

    Args:
        rule: Rule, in the type and on the device of the computation.
        spec: Specification of the network.
        parameters: Parameters of the network.
        gradients: Gradient of each; None for a parameter that is only read.
        state: State of each before this gradient.
        through_time: Whether the step is also differentiable in parameters, gradients and momenta,
            to differentiate through several steps.

    Returns:
        Update of each parameter, in its shape, and the new states.
    """
    where = next(rule.parameters())
    with nullcontext() if through_time else torch.no_grad():
        taken = [
            s if g is None else State(next_momenta(s.momenta, g.to(s.momenta)), s.step)
            for s, g in zip(state, gradients, strict=True)
        ]
        filled = [
            p.new_zeros(()).expand(p.shape) if g is None else g
            for p, g in zip(parameters, gradients, strict=True)
        ]
        # A network may be spread over devices; its graph is on one.
        seen, slopes, momenta = (
            [t.to(where.device) for t in tensors]
            for tensors in (parameters, filled, [s.momenta for s in taken])
        )
        if spec.constant_size:  # as parameters that never had a gradient
            nothing = where.new_zeros(()).expand(spec.constant_size)
            for constant in CONSTANTS:
                seen.append(where.new_full((), constant).expand(spec.constant_size))
                slopes.append(nothing)
                momenta.append(nothing.expand(len(MOMENTUM_DECAYS), -1))
        raw = [raw_numbers(*of, where.dtype) for of in zip(seen, slopes, momenta, strict=True)]
    runs = rule(topology_of(spec), raw)
    deltas, after = [], []
    for i, (p, g, s) in enumerate(zip(parameters, gradients, taken, strict=True)):
        deltas.append(torch.zeros_like(p) if g is None else torch.cat(runs[i]).view_as(p))
        after.append(s if g is None else State(s.momenta, s.step + 1))
    return deltas, after


def moved(
    weights: Tensor, update: Tensor, lr: float | Tensor, weight_decay: float | Tensor
) -> Tensor:
    """Apply an update to weights; the result has the type of the update.

    Args:
        weights: A parameter, or a range of its weights.
        update: Update, in the same shape, on any device.
        lr: Factor of the update; a tensor has one element.
        weight_decay: Decoupled weight decay: lr * weight_decay of the weights is removed first.
    """
    # A tensor of one element must change neither shape nor type of a product.
    lr, decay = (x.reshape(()) if isinstance(x, Tensor) else x for x in (lr, weight_decay))
    kept, update = weights.to(update.dtype), update.to(weights.device) * lr
    if isinstance(decay, Tensor) or decay:  # a tensor may be differentiated, even at 0
        kept = kept - kept * lr * decay
    return kept + update
