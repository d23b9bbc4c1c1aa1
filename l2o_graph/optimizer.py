"""NGOptimizer: the pure update applied in place, as a torch.optim.Optimizer."""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from l2o_graph.architecture import NetSpec, spec_of_module, spec_of_parameters
from l2o_graph.features import decays_for, zero_momenta
from l2o_graph.rule import UpdateRule
from l2o_graph.step import CHUNK_SIZE, State, updates
from l2o_graph.zoo.registry import load_checkpoint


class NGOptimizer(torch.optim.Optimizer):
    """A learned optimizer that reads the network it trains as a graph.

    Each step it makes features of every weight, its gradient and five momenta, passes them
    through a graph network over the neurons and asks a small head for every parameter's update.
    It remembers five float32 momenta a parameter and a step count, nothing else.

    Parameters without a gradient, and frozen ones, are read as context and left as they are. A
    step in which any gradient is not finite changes nothing, neither parameters nor state, and
    warns. All parameters with a gradient form one graph across groups and devices; the network
    runs where the first of them lies, in float64 if any is float64, else in float32.

    Args:
        params: Parameters, named parameters or groups, as for any optimizer. Which neurons they
            join is inferred from order, shape and, where given, name.
        lr: Factor of every update. 1 is what the checkpoint was trained for.
        weight_decay: Decoupled: each step first takes lr * weight_decay of a parameter away.
        checkpoint: A name of ``list_checkpoints()``, or a path to a file.
        model: The network that the parameters belong to, to read its structure rather than
            infer it. Those of its parameters that are not in ``params`` are context.
        maximize: Ascend rather than descend.
        chunk_size: Scalars worked on at once, some 500 bytes each.

    Raises:
        ValueError: For an unknown or unreadable checkpoint, an empty list of parameters, a
            negative ``lr`` or ``weight_decay``, or a complex parameter.
        FileNotFoundError: For a checkpoint path to nothing.

    Source:
        Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of
        Neural Networks", ICLR 2024, section 4.3; the packaged checkpoints use the features and
        the update of ``l2o_graph.rule.UpdateRule`` instead of the paper's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        checkpoint: str | Path = "fmnist",
        model: nn.Module | None = None,
        maximize: bool = False,
        chunk_size: int = CHUNK_SIZE,
    ):
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, found {chunk_size}")
        loaded = load_checkpoint(checkpoint)
        self._rule = loaded.rule
        self._placed: dict[tuple[torch.device, torch.dtype], UpdateRule] = {}
        self._chunk_size = chunk_size
        self._spec: NetSpec | None = None
        # With a model, the graph spans its parameters, whichever are to be trained.
        self._model_spec = None if model is None else spec_of_module(model)
        self._model_parameters = None if model is None else list(model.parameters())
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "checkpoint": loaded.identity,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the graph is built anew at the next step.

        Raises:
            ValueError: For a negative ``lr`` or ``weight_decay``, a complex parameter, or a
                parameter that ``model`` lacks.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for key in ("lr", "weight_decay"):
                if not group[key] >= 0:
                    raise ValueError(f"{key}: expected a number of at least 0, found {group[key]}")
            for i, p in enumerate(group["params"]):
                if p.is_complex():
                    raise ValueError(f"parameter {i}: expected a real tensor, found {p.dtype}")
                if self._model_parameters is not None and not _among(p, self._model_parameters):
                    raise ValueError(
                        f"parameter {i}, {list(p.shape)}: expected one of the model's parameters"
                    )
        except ValueError:
            self.param_groups.pop()
            raise
        self._spec = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: For a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        trained = [p for p in group_of if p.grad is not None]
        for p in trained:
            assert p.grad is not None
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"NGOptimizer: expected dense gradients, found {p.grad.layout} for a "
                    f"parameter of shape {list(p.shape)}"
                )
        if not trained:
            return loss
        if not _all_finite([p.grad for p in trained if p.grad is not None]):
            warnings.warn(
                "NGOptimizer: a gradient is not finite; this step changes nothing", stacklevel=2
            )
            return loss
        for p in trained:
            self._take_in(p, group_of[p]["maximize"])
        self._apply(group_of, trained)
        for p in trained:
            self.state[p]["step"] += 1
        return loss

    def _take_in(self, p: Tensor, maximize: bool) -> None:
        """Let the momenta of a parameter take in its gradient: ``next_momenta``, in place."""
        state = self.state[p]
        if not state:
            state["momenta"] = zero_momenta(p)
            state["step"] = state["momenta"].new_zeros(())
        momenta, gradient = state["momenta"], p.grad
        assert gradient is not None
        gradient = gradient.to(momenta)
        momenta.mul_(decays_for(momenta)).add_(-gradient if maximize else gradient)

    def _apply(self, group_of: dict[Tensor, dict[str, Any]], trained: list[Tensor]) -> None:
        """Compute the updates run by run, and write each as it comes."""
        parameters = self._model_parameters or list(group_of)
        if self._spec is None or self._spec.shapes != tuple(tuple(p.shape) for p in parameters):
            self._spec = self._model_spec or spec_of_parameters(parameters, self._names())
        has_gradient = set(trained)
        gradients, state = [], []
        for p in parameters:
            known = self.state.get(p) or {}
            if p in has_gradient and p.grad is not None:
                gradients.append(-p.grad if group_of[p]["maximize"] else p.grad)
            else:
                gradients.append(_nothing(p, p.shape))
            momenta = known.get("momenta", _nothing(p, (len(decays_for(p)), *p.shape)))
            state.append(State(momenta, known.get("step", _nothing(p, ()))))
        flat = {}
        rule = self._rule_for(trained)
        for part, update in updates(
            rule, self._spec, parameters, gradients, state, self._chunk_size
        ):
            p = parameters[part.parameter]
            if p not in has_gradient:
                continue
            # A view, but for a tensor that is not contiguous: that is written back at the end.
            weights = flat.setdefault(p, p.reshape(-1))[part.start : part.stop]
            lr, decay = group_of[p]["lr"], group_of[p]["weight_decay"]
            update = update.to(p.device) * lr
            kept = weights.to(update.dtype)
            weights.copy_((kept - kept * (lr * decay) if decay else kept) + update)
        for p, weights in flat.items():
            if not p.is_contiguous():
                p.copy_(weights.view_as(p))

    def _names(self) -> list[str] | None:
        """Names of the parameters, where every group has them."""
        if not all("param_names" in group for group in self.param_groups):
            return None
        return [name for group in self.param_groups for name in group["param_names"]]

    def _rule_for(self, trained: list[Tensor]) -> UpdateRule:
        """The rule, where the first parameter lies and in the type to compute in."""
        double = any(p.dtype == torch.float64 for p in trained)
        place = trained[0].device, torch.float64 if double else torch.float32
        if place not in self._placed:
            self._placed[place] = copy.deepcopy(self._rule).to(*place)
        return self._placed[place]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; momenta stay float32 whatever the parameters' type.

        Raises:
            ValueError: For the state of another checkpoint or of another model.
        """
        ours, theirs = self.defaults["checkpoint"], state_dict["param_groups"]
        for group in theirs:
            if group.get("checkpoint") != ours:
                raise ValueError(
                    f"state_dict: expected one of checkpoint '{ours}', "
                    f"found '{group.get('checkpoint')}'"
                )
        pairs = []
        for mine, group in zip(self.param_groups, theirs, strict=False):
            pairs += list(zip(mine["params"], group["params"], strict=False))
        momenta = {}
        for p, key in pairs:
            saved = state_dict["state"].get(key, {}).get("momenta")
            if saved is None:
                continue
            expected = (len(decays_for(p)), *p.shape)
            if tuple(saved.shape) != expected:
                raise ValueError(
                    f"state_dict: expected momenta of shape {list(expected)} for parameter {key}, "
                    f"found {list(saved.shape)}"
                )
            momenta[p] = saved
        super().load_state_dict(state_dict)
        # The base class casts every state to its parameter's type; the step count is exempt.
        for p, saved in momenta.items():
            self.state[p]["momenta"] = saved.to(p.device, torch.float32, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_rule", "_chunk_size", "_model_spec", "_model_parameters"):
            state[name] = getattr(self, name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_rule" in state:  # load_state_dict comes here too, with the rule in its place
            self._placed, self._spec = {}, None


def _among(p: Tensor, others: Sequence[Tensor]) -> bool:
    return any(p is other for other in others)


def _nothing(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros that take no memory."""
    return p.new_zeros((), dtype=torch.float32).expand(shape)


def _all_finite(gradients: list[Tensor]) -> bool:
    """Whether all are finite; one wait for the device."""
    device = gradients[0].device
    return bool(torch.stack([g.isfinite().all().to(device) for g in gradients]).all())
