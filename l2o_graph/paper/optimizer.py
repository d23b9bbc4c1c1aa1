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
    """The learned optimizer of the paper, for comparison and for research; see ``NGOptimizer``.

    Each step it makes features of every weight, its gradient and five momenta, lets a network
    read them (NG-GNN, NG-T, NFN, LSTM or FF), and asks a head for every parameter's direction d
    and magnitude m; the update is 0.01 d exp(0.01 m). Nothing bounds it, and no checkpoint is
    packaged: train one with ``python -m meta_train --preset paper``. Kernels of more than 5 by 5
    positions are refused. It remembers five momenta a parameter in float32 and a step count.

    Parameters without a gradient, and frozen ones, are read as context and left as they are. A
    step in which any gradient is not finite, or longer than 1e17, changes nothing, neither
    parameters nor state, and warns. All parameters with a gradient form one graph across groups
    and devices; the network runs where the first of them lies, in float64 if any is float64, else
    in float32.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer. Which neurons they
            join is inferred from order, shape and, where given, name.
        lr: Factor of every update. 1 is what a checkpoint was trained for. A tensor has one
            element.
        weight_decay: Decoupled: each step first takes lr * weight_decay of a parameter away.
        checkpoint: A path to a file. Or the rule itself, as one that is being meta-trained: it is
            used as it is, never copied, and so has to be of the type and on the device to compute
            in.
        model: The network that the parameters belong to: its structure is then read from the
            first batch that it is called with, whatever it computes, rather than inferred. Those
            of its parameters that are not in ``params`` are context. A pickle or a deep copy of
            the optimizer holds it too. Where ``params`` is ``model.parameters()`` itself it need
            not be given.
        maximize: Ascend rather than descend.

    In ``higher.innerloop_ctx`` and its like the optimizer works if ``higher`` was imported before
    it was made; see ``l2o_graph.higher_support``.

    Raises:
        ValueError: For an unreadable checkpoint or one of another kind, an empty list of
            parameters, a negative ``lr`` or ``weight_decay``, a complex parameter, or one that
            ``model`` lacks.
        TypeError: For a parameter that is sharded over processes (FSDP, DTensor), inside of
            ZeroRedundancyOptimizer, and for a ``model`` that is no module or one of TorchScript.
        FileNotFoundError: For a checkpoint path to nothing.

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
            # Named for its kind alone: its weights may change while the optimizer is in use.
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
        """Take the step."""
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
        """What is remembered of a parameter; of one that is read alone zeros without memory."""
        state, kind = self.state.get(p, {}), state_type(p)
        if fits(state, p):  # but the model may have been converted meanwhile
            return State(state["momenta"].to(kind), state["step"].to(kind))
        if is_trained:
            return State.fresh(p)
        nothing = p.new_zeros((), dtype=kind)
        return State(nothing.expand(len(MOMENTUM_DECAYS), *p.shape), nothing)

    def _rule_for(self, trained: Sequence[Tensor]) -> UpdateRule:
        """The rule, where the first parameter lies and in the type to compute in."""
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
    """Whether there is a state for a parameter of this shape; reshaped ones start anew."""
    return bool(state) and state["momenta"].shape[1:] == p.shape
