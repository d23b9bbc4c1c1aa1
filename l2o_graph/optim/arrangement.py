"""Parameters of one type on one device: their layout in stacks, and their step."""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor functions have no public names.

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from l2o_graph.layout.spec import NetSpec
from l2o_graph.layout.tensors import state_type
from l2o_graph.optim.averaging import follow
from l2o_graph.optim.blocks import Block, blocks_of
from l2o_graph.optim.controller import Learned
from l2o_graph.optim.memory import Memory, arrange, gathered, scattered
from l2o_graph.optim.sharded import Sharing
from l2o_graph.optim.step import advance


@dataclass(eq=False)
class Arrangement:
    """Parameters of one type on one device, laid out in stacks.

    Attributes:
        memory: Their stacks, N = 1.
        index: Index of each parameter in the network.
        parameters: The parameters.
        views: Views of each parameter's part of the memory, by their names in ``optimizer.state``.
        states: Whole entry of each parameter in ``optimizer.state``.
        ages: Number of steps of each so far.
        shapes: Shape of each when it was laid out.
        anew: Number of parameters whose state did not fit and was reset.
        sharing: Ranks and ownership, if parameters are sharded.
    """

    memory: Memory
    index: list[int]
    parameters: list[Tensor]
    views: list[dict[str, Tensor]]
    states: list[dict[str, Tensor]]
    ages: list[int]
    shapes: list[torch.Size]
    anew: int
    sharing: Sharing | None

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.memory.history.ages.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the state and of all computation."""
        return self.memory.history.ages.dtype

    @staticmethod
    def of(
        spec: NetSpec,
        index: list[int],
        parameters: list[Tensor],
        states: list[dict[str, Tensor]],
        sharing: Sharing | None = None,
    ) -> "Arrangement":
        """Lay parameters out, and keep their state where it fits."""
        place = {i: j for j, i in enumerate(index)}
        blocks = [b for b in blocks_of(spec) if b.parameter in place]
        one = parameters[0]
        like = torch.zeros((), device=one.device, dtype=state_type(one))
        for p, state in zip(parameters, states, strict=True):
            offset = state.get("offset")
            if offset is None or offset.shape != p.shape:  # new, or its shape has changed
                state.clear()
                state["step"] = torch.zeros((), dtype=like.dtype)
                start = like.new_zeros(p.shape)
                state["offset"] = start if sharing is None else sharing.mine_of(p, start)
            else:
                state["step"] = state["step"].to("cpu", like.dtype)
                state["offset"] = offset.to(like.to(offset.device) if offset.is_meta else like)
        mine = None
        if sharing is not None:
            mine = [sharing.is_mine(parameters[place[b.parameter]]) for b in blocks]
        summed = None if sharing is None else sharing.summed
        memory, views = _laid_out(spec, blocks, states, place, like, mine, summed)
        anew = 0
        for state, own in zip(states, views, strict=True):
            if int(state["step"]) and not _fits(state, own):
                state["step"].zero_()
                state["offset"].zero_()
                anew += 1
        if anew:  # ages have changed, and stacks are of one age
            memory, views = _laid_out(spec, blocks, states, place, like, mine, summed)
        for state, own in zip(states, views, strict=True):
            _take_over(state, own)
        ages, shapes = [int(state["step"]) for state in states], [p.shape for p in parameters]
        return Arrangement(memory, index, parameters, views, states, ages, shapes, anew, sharing)

    def holds(self, states: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Return whether ``optimizer.state`` still holds the views of this layout."""
        for p, mine, state in zip(self.parameters, self.views, self.states, strict=True):
            if states.get(p) is not state or any(state.get(n) is not t for n, t in mine.items()):
                return False
        return torch.stack([state["step"] for state in self.states]).tolist() == self.ages

    def is_current(self) -> bool:
        """Return whether shape, type and device of all parameters are unchanged."""
        return all(
            p.shape == shape and p.device == self.device and state_type(p) == self.dtype
            for p, shape in zip(self.parameters, self.shapes, strict=True)
        )

    @cached_property
    def _moves(self) -> dict[int, Tensor] | None:
        """Updates as views of the stacks, which stay valid; None if any has to be a copy."""
        lasts = [stack.last for stack in self.memory.stacks]
        found = self._of_parameters(lasts)
        own = {last.untyped_storage().data_ptr() for last in lasts}
        are_views = all(t.untyped_storage().data_ptr() in own for t in found.values())
        return found if are_views else None

    def _of_parameters(self, updates: Sequence[Tensor]) -> dict[int, Tensor]:
        """Turn updates of stacks into updates of the parameters here, by their index."""
        found = scattered(self.memory, updates)
        return {j: found[i].view(self.shapes[j]) for j, i in enumerate(self.index) if i in found}

    def step(
        self,
        learned: Learned,
        group_of: Mapping[Tensor, dict[str, Any]],
        gradient_of: Mapping[Tensor, Tensor],
        horizon: int,
        few: Tensor | None = None,
    ) -> None:
        """Update all parameters and their state.

        Args:
            learned: Learned constants and weights, N = 1.
            group_of: Group of each parameter.
            gradient_of: Gradient of each.
            horizon: Number of steps of the whole run, 0 if it is not known.
            few: Degree ε to which examples are few, see ``Examples.few``.
        """
        given = {p: gradient_of[p] for p in self.parameters}
        weights: dict[Tensor, Tensor] = {p: p for p in self.parameters}
        if self.sharing is not None:
            given, weights = self.sharing.to_owners(given), self.sharing.to_owners(weights)
        here = [j for j, p in enumerate(self.parameters) if p in weights]
        gradients, current = (
            {self.index[j]: of[self.parameters[j]].reshape(1, -1).to(self.dtype) for j in here}
            for of in (given, weights)
        )
        ages = self.memory.history.ages
        updates, _ = advance(
            learned,
            self.memory,
            gathered(self.memory, gradients),
            gathered(self.memory, current),
            ages.new_full((1,), float(horizon)) if horizon else None,
            None if few is None else few.to(ages),
        )
        moves_of = self._moves or self._of_parameters(updates)
        alike: dict[tuple[int, int], list[int]] = {}
        for j in here:
            alike.setdefault((id(group_of[self.parameters[j]]), self.ages[j]), []).append(j)
        for (_, age), members in alike.items():
            group = group_of[self.parameters[members[0]]]
            chosen = [weights[self.parameters[j]] for j in members]
            offsets = [self.states[j]["offset"] for j in members]
            moves = [moves_of[j] for j in members]
            _move(chosen, offsets, moves, age, group["lr"], group["weight_decay"])
        torch._foreach_add_([state["step"] for state in self.states], 1)
        self.ages = [age + 1 for age in self.ages]
        if self.sharing is not None:
            self.sharing.from_owners(self.parameters, weights)


def _laid_out(
    spec: NetSpec,
    blocks: Sequence[Block],
    states: Sequence[dict[str, Tensor]],
    place: Mapping[int, int],
    like: Tensor,
    here: Sequence[bool] | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Memory, list[dict[str, Tensor]]]:
    """Arrange blocks by the ages of their parameters; return views for each parameter, too."""
    ages = [int(states[place[b.parameter]]["step"]) for b in blocks]
    memory = arrange(spec, blocks, 1, ages, like, here, summed)
    views: list[dict[str, Tensor]] = [{} for _ in states]
    for block, owned in sorted(owners(memory), key=lambda found: found[0].start):
        mine = views[place[block.parameter]]
        number = sum(name.startswith("momenta") for name in mine)
        suffix = f".{number}" if number else ""
        mine |= {name + suffix: tensor for name, tensor in owned.items()}
    return memory, views


def owners(memory: Memory) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """Yield each block of one network's memory with views of its part of the tensors.

    Tensors held by other ranks are on the meta device; those of rows and matrices are on all ranks.
    """
    history = memory.history
    for stack in memory.all_stacks:
        r, at = stack.shape[1], 0
        owned = stack.owned()
        rows, tensors = history.rows[:, 0], history.tensors[:, 0]
        for block in stack.blocks:
            n = block.matrix[0]
            first = stack.rows[0] + at * r
            tensor = stack.tensors[0] + at
            mine = {
                name: (t[:, 0, at : at + n] if name == "momenta" else t[0, at : at + n])
                for name, t in owned.items()
            }
            for name in ("momenta", "square"):  # short blocks are padded with zeros
                if name in mine:
                    mine[name] = mine[name][..., : block.matrix[2]]
            mine["rows"] = rows[:, first : first + n * r]
            mine["tensors"] = tensors[:, tensor : tensor + n]
            yield block, mine
            at += n


def _fits(state: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> bool:
    """Return whether a state has the shapes of its new place."""
    return all(name in state and state[name].shape == tensor.shape for name, tensor in mine.items())


def _take_over(state: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    """Copy a state into its new place if it fits; ``state`` then holds the new tensors."""
    if int(state["step"]) and _fits(state, mine):
        for name, tensor in mine.items():
            tensor.copy_(state[name])
    kept = {name: state[name] for name in ("step", "offset")}
    state.clear()
    state.update({**kept, **mine})


def _move(
    parameters: list[Tensor],
    offsets: list[Tensor],
    updates: list[Tensor],
    age: int,
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> None:
    """Apply updates and weight decay to parameters of a group.

    AdamW changes a weight by about lr per step, and decays it by lr * weight_decay. Here the RMS
    of the update takes the place of lr. Parameters of low precision are rounded once.

    Args:
        parameters: Parameters, changed in place.
        offsets: Offsets, see ``averaging.follow``.
        updates: Updates of the rule, in the type of its computation.
        age: Number of steps before this one.
        lr: Factor of all updates; the number 0 leaves parameters unchanged.
        weight_decay: Weight decay of the group.
    """
    if isinstance(lr, Tensor):
        lr = lr.reshape(()).to(updates[0])
    elif lr == 0:
        return
    if isinstance(weight_decay, Tensor):
        weight_decay = weight_decay.reshape(()).to(updates[0])
    wide = [p.to(u) for p, u in zip(parameters, updates, strict=True)]
    moves = updates
    if isinstance(lr, Tensor) or lr != 1:
        moves = list(torch._foreach_mul(updates, lr))
    if isinstance(weight_decay, Tensor) or weight_decay:
        sizes = updates[0].new_tensor([u.numel() for u in updates])
        rms = torch.stack(torch._foreach_norm(updates)) / sizes.sqrt()
        taken = (rms * lr * weight_decay).clamp(max=1)
        shrunk = torch._foreach_mul(wide, list(taken.unbind()))
        moves = torch._foreach_sub(moves, shrunk)
    follow(wide, offsets, list(moves), age)
    for p, w in zip(parameters, wide, strict=True):
        if w is not p:
            p.copy_(w)
