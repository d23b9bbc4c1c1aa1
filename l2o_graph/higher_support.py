"""``PaperOptimizer`` inside the package ``higher``, whose inner loops are differentiated through.

With ``higher`` imported before the optimizer is made, nothing else is to be done::

    import higher

    rule = untrained(PAPER["ng_gnn"], seed=0)  # or load_checkpoint(path).rule, or one of your own
    optimizer = PaperOptimizer(model.parameters(), checkpoint=rule)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        diffopt.step(loss(fmodel))
        loss(fmodel).backward()  # gradients of the rule's weights

Where ``higher`` says instead that a type of optimizer is not supported, import this module, or
call ``register`` on the type. What is called in the loop is a copy of the model: an optimizer that
was given ``model`` reads its structure from the first batch of the model itself, or from
``optimizer.read_structure((batch,))``. Memory grows with every step: the whole inner loop is kept.

``NGOptimizer`` is refused: its steps are made in place, in memory that all steps share.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from l2o_graph.optim.base import LearnedOptimizer
from l2o_graph.optim.optimizer import NGOptimizer
from l2o_graph.paper.optimizer import PaperOptimizer, fits
from l2o_graph.paper.step import State, moved, update

try:
    from higher.optim import DifferentiableOptimizer, register_optim
except ImportError as error:
    raise ImportError("expected the package 'higher': pip install 'l2o_graph[higher]'") from error


class DifferentiablePaperOptimizer(DifferentiableOptimizer):
    """The step of a ``PaperOptimizer``, nothing in place.

    Differentiable in the initial parameters, in ``lr`` and ``weight_decay`` where tensors override
    them, and in the rule's weights where they require gradients; in none of them with
    ``track_higher_grads=False``. Everything else is as in the optimizer's own ``step``. The state
    goes on from the optimizer's and never returns to it, as always in ``higher``.

    Args:
        other: The optimizer.
        reference_params: The parameters of the model.
        settings: See ``higher.optim.DifferentiableOptimizer``.
    """

    def __init__(self, other: PaperOptimizer, reference_params: Iterable[Tensor], **settings: Any):
        self._optimizer, self._reference = other, list(reference_params)
        super().__init__(other, self._reference, **settings)

    def _update(self, grouped_grads: Sequence[Sequence[Tensor | None]], **_: Any) -> None:
        """Put new tensors in the places of the parameters.

        Raises:
            RuntimeError: For a sparse gradient.
            ValueError: For a rule that was given and is not where or what it has to be.
        """
        fast = None if self._fmodel is None else self._fmodel.fast_params
        current = dict(zip(self._reference, fast or self._reference, strict=True))
        place, gradient_of = {}, {}
        for i, (group, gradients) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for j, gradient in enumerate(gradients):
                p = self._reference[self._group_to_param_list[i][j]]
                place[p], current[p] = (i, j), group["params"][j]
                # Without higher gradients ``higher`` lets even frozen parameters require them.
                if gradient is not None and p.requires_grad:
                    gradient_of[p] = -gradient if group["maximize"] else gradient
        if not self._optimizer._accepts(gradient_of):
            return
        parameters, spec = self._optimizer._network(list(place))
        with torch.set_grad_enabled(self._track_higher_grads):
            deltas, after = update(
                self._optimizer._rule_for([current[p] for p in gradient_of]),
                spec,
                [current.get(p, p) for p in parameters],
                [gradient_of.get(p) for p in parameters],
                [self._state_of(p, current.get(p, p), place.get(p)) for p in parameters],
                through_time=True,
            )
            for p, (i, j) in place.items():
                # A new tensor even without a gradient: others have read the old one, and through
                # them the next loss would give it a gradient that it does not have outside.
                self.param_groups[i]["params"][j] = current[p].view_as(current[p])
            for p, delta, state in zip(parameters, deltas, after, strict=True):
                if p in gradient_of:
                    (i, j), now = place[p], current[p]
                    group = self.param_groups[i]
                    new = moved(now, delta, group["lr"], group["weight_decay"])
                    group["params"][j] = new.to(now.dtype)
                    self.state[i][j] = {"momenta": state.momenta, "step": state.step}

    def _state_of(self, p: Tensor, now: Tensor, place: tuple[int, int] | None) -> State:
        """What is remembered of a parameter; nothing, where it is in no group."""
        state = self.state[place[0]].get(place[1], {}) if place else {}
        return State(state["momenta"], state["step"]) if fits(state, p) else State.fresh(now)


class Refusal(DifferentiableOptimizer):
    """What ``higher`` gets for a learned optimizer that it cannot differentiate.

    Raises:
        TypeError: Always.
    """

    def __init__(self, other: LearnedOptimizer, *_: Any, **__: Any):
        raise TypeError(
            f"higher cannot differentiate through {type(other).__name__}, whose steps are made in "
            "place; use PaperOptimizer, or one of torch's own optimizers, in its inner loops"
        )

    def _update(self, grouped_grads: Sequence[Sequence[Tensor | None]], **_: Any) -> None:
        raise NotImplementedError


def register(optimizer: type[LearnedOptimizer]) -> None:
    """Tell ``higher`` of a type of optimizer; its subclasses are types of their own."""
    known = issubclass(optimizer, PaperOptimizer)
    # Annotated there as an optimizer, documented as its type.
    register_optim(optimizer, DifferentiablePaperOptimizer if known else Refusal)  # pyright: ignore[reportArgumentType]


register(PaperOptimizer)
register(NGOptimizer)
