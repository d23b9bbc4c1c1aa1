"""``PaperOptimizer`` in differentiable inner loops of the package ``higher``.

Import ``higher`` before you create the optimizer; nothing else is needed::

    import higher

    rule = untrained(PAPER["ng_gnn"], seed=0)  # or load_checkpoint(path).rule, or one of your own
    optimizer = PaperOptimizer(model.parameters(), checkpoint=rule)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        diffopt.step(loss(fmodel))
        loss(fmodel).backward()  # gradients of the rule's weights

If ``higher`` says that a type of optimizer is not supported, import this module, or call
``register`` on the type. The loop calls a copy of the model, so an optimizer with ``model`` reads
the structure only from an earlier call of the model itself, or from
``optimizer.read_structure((batch,))``. Memory grows with every step of the inner loop.

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
    """Differentiable step of a ``PaperOptimizer``, without changes in place.

    It is differentiable in the initial parameters, in ``lr`` and ``weight_decay`` if tensors
    override them, and in the rule's weights if they require gradients; in none of them with
    ``track_higher_grads=False``. Otherwise it equals the optimizer's own ``step``. The state starts
    as a copy of the optimizer's, which never changes, as always in ``higher``.

    Args:
        other: The optimizer.
        reference_params: Parameters of the model.
        settings: Options of ``higher.optim.DifferentiableOptimizer``.
    """

    def __init__(self, other: PaperOptimizer, reference_params: Iterable[Tensor], **settings: Any):
        self._optimizer, self._reference = other, list(reference_params)
        super().__init__(other, self._reference, **settings)

    def _update(self, grouped_grads: Sequence[Sequence[Tensor | None]], **_: Any) -> None:
        """Replace the parameters by updated tensors.

        Raises:
            RuntimeError: For a sparse gradient.
            ValueError: For a rule of another type or on another device than the parameters.
        """
        fast = None if self._fmodel is None else self._fmodel.fast_params
        current = dict(zip(self._reference, fast or self._reference, strict=True))
        place, gradient_of = {}, {}
        for i, (group, gradients) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for j, gradient in enumerate(gradients):
                p = self._reference[self._group_to_param_list[i][j]]
                place[p], current[p] = (i, j), group["params"][j]
                # Without higher gradients, ``higher`` makes even frozen parameters require them.
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
                # A new tensor even without a gradient: other updates have read the old one, through
                # which the next loss would give it a gradient that it does not have otherwise.
                self.param_groups[i]["params"][j] = current[p].view_as(current[p])
            for p, delta, state in zip(parameters, deltas, after, strict=True):
                if p in gradient_of:
                    (i, j), now = place[p], current[p]
                    group = self.param_groups[i]
                    new = moved(now, delta, group["lr"], group["weight_decay"])
                    group["params"][j] = new.to(now.dtype)
                    self.state[i][j] = {"momenta": state.momenta, "step": state.step}

    def _state_of(self, p: Tensor, now: Tensor, place: tuple[int, int] | None) -> State:
        """Return the state of a parameter; a fresh one if it is in no group."""
        state = self.state[place[0]].get(place[1], {}) if place else {}
        return State(state["momenta"], state["step"]) if fits(state, p) else State.fresh(now)


class Refusal(DifferentiableOptimizer):
    """Placeholder for a learned optimizer that ``higher`` cannot differentiate through.

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
    """Register a type of optimizer with ``higher``; subclasses have to be registered separately."""
    known = issubclass(optimizer, PaperOptimizer)
    # Annotated there as an optimizer, documented as its type.
    register_optim(optimizer, DifferentiablePaperOptimizer if known else Refusal)  # pyright: ignore[reportArgumentType]


register(PaperOptimizer)
register(NGOptimizer)
