"""The learned optimizer of Kofinas et al. 2024 as a torch.optim.Optimizer."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from l2o_graph.layout.tensors import state_type
from l2o_graph.optim.base import LearnedOptimizer
from l2o_graph.optim.saved import check_numbers, with_step
from l2o_graph.paper.checkpoints import Checkpoint, load_checkpoint
from l2o_graph.paper.features import MOMENTUM_DECAYS
from l2o_graph.paper.rule import UpdateRule
from l2o_graph.paper.step import State, moved, update


class PaperOptimizer(LearnedOptimizer):
    """The learned optimizer of Kofinas et al. 2024, for comparison and research.

    In each step, a network (NG-GNN, NG-T, NFN, LSTM or FF) reads features of every weight, its
    gradient and five momenta. A head then gives a direction d and a magnitude m for every weight,
    and the update is 0.01 d exp(0.01 m), which is unbounded. No checkpoint is packaged: train one
    with ``python -m meta_train --preset paper``. Kernels of more than 5 by 5 positions are refused.
    The state of a parameter is five momenta in float32, and a step count.

    Parameters without a gradient, and frozen ones, are read but not changed. If any gradient is
    not finite or has a norm above 1e17, the step changes nothing and warns. All parameters with a
    gradient form one graph across groups and devices. The network runs on the device of the first
    of them, in float64 if any is float64, else in float32.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer.
        lr: Factor of every update, a number or a tensor with one element; a checkpoint was trained
            for 1.
        weight_decay: Decoupled weight decay: each step first removes lr * weight_decay of a
            parameter.
        checkpoint: A path to a file, or a rule, for example during meta-training. A rule is used
            without a copy, and has to have the type and device of the computation.
        model: Module that the parameters belong to. Its structure is then read from its first
            forward pass instead of being inferred from order, shapes and names of the parameters.
            Its parameters that are not in ``params`` are read, too. It is found by itself if
            ``params`` is ``model.parameters()``. Pickles and deep copies of the optimizer include a
            model that was passed here.
        maximize: Maximize the objective instead of minimizing it.

    In ``higher.innerloop_ctx`` and similar, the optimizer works if ``higher`` was imported before
    the optimizer was created; see ``l2o_graph.higher_support``.

    Raises:
        ValueError: For an unreadable checkpoint or one of another kind, an empty list of
            parameters, a negative ``lr`` or ``weight_decay``, a complex parameter, or a parameter
            that is not one of ``model``.
        TypeError: For a parameter that is sharded over processes (FSDP, DTensor), inside
            ZeroRedundancyOptimizer, and for a ``model`` that is not a module or is a TorchScript
            module.
        FileNotFoundError: For a checkpoint path that does not exist.

    Source:
        Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of
        Neural Networks", ICLR 2024, section 4.3.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        checkpoint: str | Path | UpdateRule,
        model: nn.Module | None = None,
        maximize: bool = False,
    ):
        self._given = isinstance(checkpoint, UpdateRule)
        if isinstance(checkpoint, UpdateRule):
            # Named only by its kind: its weights may change while the optimizer is in use.
            loaded = Checkpoint(f"{checkpoint.config.model} in memory", checkpoint, {})
        else:
            loaded = load_checkpoint(checkpoint)
        self._rule = loaded.rule
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "checkpoint": loaded.identity,
        }
        super().__init__(params, defaults, model)

    def _apply(
        self, group_of: dict[Tensor, dict[str, Any]], gradient_of: dict[Tensor, Tensor]
    ) -> None:
        """Make the step."""
        rule = self._rule_for(list(gradient_of))
        parameters, spec = self._network(list(group_of))
        gradients = [gradient_of.get(p) for p in parameters]
        before = [self._state_of(p, p in gradient_of) for p in parameters]
        deltas, after = update(rule, spec, parameters, gradients, before)
        for p, delta, state in zip(parameters, deltas, after, strict=True):
            if p in gradient_of:
                group = group_of[p]
                p.copy_(moved(p, delta, group["lr"], group["weight_decay"]))
                self.state[p].update(momenta=state.momenta, step=state.step)

    def _state_of(self, p: Tensor, is_trained: bool) -> State:
        """Return the state of a parameter; expanded zeros for one that is only read."""
        state, kind = self.state.get(p, {}), state_type(p)
        if fits(state, p):  # the model may have been converted since
            return State(state["momenta"].to(kind), state["step"].to(kind))
        if is_trained:
            return State.fresh(p)
        nothing = p.new_zeros((), dtype=kind)
        return State(nothing.expand(len(MOMENTUM_DECAYS), *p.shape), nothing)

    def _rule_for(self, trained: Sequence[Tensor]) -> UpdateRule:
        """Return the rule on the device of the first parameter, in the type of the computation."""
        double = any(p.dtype == torch.float64 for p in trained)
        place = trained[0].device, torch.float64 if double else torch.float32
        if self._given:
            first = next(self._rule.parameters())
            if (first.device, first.dtype) != place:
                raise ValueError(
                    f"{type(self).__name__}: expected a rule in {place[1]} on {place[0]}, as its "
                    f"parameters are, found one in {first.dtype} on {first.device}"
                )
            return self._rule
        if place not in self._placed:
            self._placed[place] = copy.deepcopy(self._rule).to(*place)
        return self._placed[place]

    def _copy_of(self, saved: Any, key: Any, parameter: Tensor) -> dict[str, Tensor]:
        saved = with_step(saved, key)
        shapes = {"momenta": [len(MOMENTUM_DECAYS), *parameter.shape], "step": []}
        found = {k: list(v.shape) if isinstance(v, Tensor) else v for k, v in saved.items()}
        if found != shapes:
            raise ValueError(
                f"state_dict: expected shapes {shapes} for parameter {key}, found {found}"
            )
        check_numbers(saved, key)
        kind = state_type(parameter)
        return {k: v.to(parameter.device, kind, copy=True) for k, v in saved.items()}

    def _forget(self) -> None:
        super()._forget()
        self._placed: dict[tuple[torch.device, torch.dtype], UpdateRule] = {}

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_rule", "_given")}
        return {**super().__getstate__(), **own}


def fits(state: dict[str, Any], p: Tensor) -> bool:
    """Return whether there is a state for a parameter of this shape; otherwise it is reset."""
    return bool(state) and state["momenta"].shape[1:] == p.shape
