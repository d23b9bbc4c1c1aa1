"""Parameters that are sharded over ranks (FSDP2, tensor parallelism), and their owners.

Each parameter has one owner among the ranks. In a step the owner receives its whole gradient and
weight, holds its state, computes its update and sends each rank the shard of the new weight. Ranks
add up sums over rows and messages between neurons. A saved state consists of DTensors and does not
depend on owners.
"""

import gc
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2o_graph.layout.tensors import is_sharded

if TYPE_CHECKING:  # importing it takes long, and few users need it
    from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; for a DTensor a collective call."""
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach()


def here(tensor: Tensor) -> Tensor:
    """Return the local part of a tensor."""
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()


@dataclass(frozen=True, eq=False)
class Sharing:
    """Ranks that train one network together, and the owner of each parameter.

    Every method but ``is_mine`` and ``mine_of`` is a collective call.
    """

    group: Any  # process group of the ranks
    members: list[int]  # global rank of each, in the group's order
    rank: int  # rank of this process in the group
    owner_of: Mapping[Tensor, int]  # rank that owns each parameter

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.members)

    def is_mine(self, parameter: Tensor) -> bool:
        """Return whether this rank owns a parameter."""
        return self.owner_of[parameter] == self.rank

    def summed(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def agreed(self, is_fit: bool, given: Iterable[Tensor]) -> bool:
        """Return whether gradients are usable on all ranks; ``given`` have one on this rank.

        Raises:
            RuntimeError: If ranks have gradients of different parameters.
        """
        having = set(given)
        has = [int(p in having) for p in self.owner_of]
        lacks = [1 - each for each in has]
        device = here(next(iter(self.owner_of))).device
        least = torch.tensor([int(is_fit), *has, *lacks], device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
        fit, *either = least.tolist()
        count = len(has)
        apart = [i for i in range(count) if not either[i] and not either[count + i]]
        if apart:
            raise RuntimeError(
                f"parameter {apart[0]}: expected a gradient on all ranks or on none, found one on "
                f"some; sharded networks have to use the same parameters everywhere"
            )
        return bool(fit)

    def to_owners(self, tensors: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Assemble sharded tensors, each on the rank that owns its parameter.

        Returns:
            Whole tensors of the parameters that this rank owns.
        """
        answer: dict[Tensor, Tensor] = {}
        cut, others = self._parted(tensors)
        for p in others:
            found = whole(tensors[p])
            if self.is_mine(p):
                answer[p] = found
        for of_owner in cut:
            mine = of_owner[self.rank]
            sent = [[here(tensors[p]) for p in of_one] for of_one in of_owner]
            shapes = [[_shard(p, rank, self.size) for p in mine] for rank in range(self.size)]
            like = tensors[next(chain(*of_owner))]
            for p, *shards in zip(mine, *self._exchanged(sent, shapes, like), strict=True):
                answer[p] = torch.cat(shards, _axis(p))
        return answer

    def from_owners(self, parameters: Sequence[Tensor], tensors: Mapping[Tensor, Tensor]) -> None:
        """Write the owners' whole tensors into the parameters, on each rank its shard.

        ``tensors`` are those of the parameters that this rank owns.
        """
        cut, others = self._parted({p: p for p in parameters})
        for p in others:
            self.give(p, tensors.get(p, p))
        for of_owner in cut:
            pieces = [self._pieces(p, tensors[p]) for p in of_owner[self.rank]]
            sent = [[of_one[rank] for of_one in pieces] for rank in range(self.size)]
            shapes = [[_shard(p, self.rank, self.size) for p in of_one] for of_one in of_owner]
            found = self._exchanged(sent, shapes, next(chain(*of_owner)))
            for p, shard in zip(chain(*of_owner), chain(*found), strict=True):
                here(p).copy_(shard)

    def _parted(
        self, tensors: Mapping[Tensor, Tensor]
    ) -> "tuple[list[list[list[DTensor]]], list[Tensor]]":
        """Separate parameters that one exchange can move, by types and owners, from all others.

        In an exchange, parameters and tensors are sharded along one axis in the order of the
        ranks. Others are gathered one by one, on all ranks.
        """
        cut: dict[torch.dtype, list[list[DTensor]]] = {}
        others: list[Tensor] = []
        for p, t in tensors.items():
            if is_sharded(p) and is_sharded(t) and self._is_cut(p, t):
                of_owner = cut.setdefault(t.dtype, [[] for _ in range(self.size)])
                of_owner[self.owner_of[p]].append(p)
            else:
                others.append(p)
        return list(cut.values()), others

    def _is_cut(self, parameter: "DTensor", tensor: "DTensor") -> bool:
        from torch.distributed.tensor import Shard

        in_order = parameter.device_mesh.mesh.tolist() == self.members
        alike = tensor.placements == parameter.placements
        return in_order and alike and [type(x) for x in parameter.placements] == [Shard]

    def _exchanged(
        self,
        sent: Sequence[Sequence[Tensor]],
        shapes: Sequence[Sequence[tuple[int, ...]]],
        like: Tensor,
    ) -> list[list[Tensor]]:
        """Send tensors to each rank in one exchange; return those received, of these shapes.

        ``like`` is a tensor of their type and device.
        """
        sizes = [[math.prod(shape) for shape in of_one] for of_one in shapes]
        given = [sum(t.numel() for t in tensors) for tensors in sent]
        taken = [sum(of_one) for of_one in sizes]
        out = torch.cat([here(like).new_empty(0), *(t.flatten() for ts in sent for t in ts)])
        found = out.new_empty(sum(taken))
        dist.all_to_all_single(found, out, taken, given, self.group)
        return [
            [t.view(shape) for t, shape in zip(part.split(of_one), of_rank, strict=True)]
            for part, of_one, of_rank in zip(found.split(taken), sizes, shapes, strict=True)
        ]

    def _pieces(self, parameter: "DTensor", tensor: Tensor) -> Sequence[Tensor]:
        """Split a whole tensor into the shards of all ranks."""
        dim = _axis(parameter)
        return tensor.split([_shard(parameter, r, self.size)[dim] for r in range(self.size)], dim)

    def spread(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Broadcast a tensor from the owner of a parameter to every rank.

        On other ranks ``tensor`` has the same shape and type, and may be on the meta device.
        """
        if self.is_mine(parameter):
            found = tensor.contiguous()
        else:
            found = torch.empty(tensor.shape, dtype=tensor.dtype, device=here(parameter).device)
        dist.broadcast(found, self.members[self.owner_of[parameter]], self.group)
        return found

    def give(self, parameter: Tensor, tensor: Tensor) -> None:
        """Write the owner's tensor into the parameter, on each rank its shard."""
        found = self.spread(parameter, tensor)
        if is_sharded(parameter):
            found = _cut(found, parameter, parameter.placements)
        parameter.copy_(found)

    def saved(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Convert a tensor of the owner's state to the DTensor that a saved state contains.

        It is sharded like the parameter if it has its shape, and along its longest axis otherwise.
        The state of a replicated parameter is replicated.
        """
        found = self.spread(parameter, tensor)
        if not is_sharded(parameter):
            return found
        placements = parameter.placements
        if found.shape != parameter.shape:
            from torch.distributed.tensor import Replicate, Shard

            longest = max(range(found.dim()), key=found.shape.__getitem__, default=0)
            split = Shard(longest) if found.dim() else Replicate()
            placements = [split if p.is_shard() else Replicate() for p in placements]
        return _cut(found, parameter, placements).clone()  # a view would keep all of it

    def mine_of(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return the tensor on the owner of the parameter, its shape on meta elsewhere."""
        return tensor if self.is_mine(parameter) else tensor.to("meta")


def _cut(tensor: Tensor, parameter: "DTensor", placements: Sequence[Any]) -> "DTensor":
    """Shard a tensor that every rank has over the mesh of a parameter."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, placements)


def _axis(parameter: "DTensor") -> int:
    """Return the axis along which a parameter is sharded."""
    from torch.distributed.tensor import Shard

    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    return placement.dim


def _shard(parameter: "DTensor", rank: int, ranks: int) -> tuple[int, ...]:
    """Return the shape of a rank's shard; the last ones may be empty."""
    dim, shape = _axis(parameter), list(parameter.shape)
    each = -(-shape[dim] // ranks)
    shape[dim] = max(min(each, shape[dim] - rank * each), 0)
    return tuple(shape)


def sharing_of(parameters: Sequence[Tensor]) -> Sharing | None:
    """Assign an owner to each parameter; None if no parameter is sharded.

    Each parameter in turn goes to the rank with the fewest scalars so far, so that parameters
    added later do not change earlier assignments.

    Raises:
        ValueError: If the parameters' meshes are not parts of one that is a process group.
    """
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        return None
    meshes = {p.device_mesh for p in sharded}
    largest = max(meshes, key=lambda mesh: mesh.size())
    members = set(largest.mesh.flatten().tolist())
    if any(not members.issuperset(mesh.mesh.flatten().tolist()) for mesh in meshes):
        raise ValueError(
            "expected parameters on one mesh or on parts of it, found several meshes; create one "
            "optimizer for each mesh"
        )
    if largest.ndim == 1:
        group = largest.get_group()
    elif largest.size() == dist.get_world_size():
        group = dist.group.WORLD
    else:
        raise ValueError(
            f"expected a mesh with one axis or with all {dist.get_world_size()} processes, found "
            f"one of shape {tuple(largest.shape)}"
        )
    loads = [(0, rank) for rank in range(largest.size())]
    owner_of: dict[Tensor, int] = {}
    for p in parameters:
        load, rank = heapq.heappop(loads)
        owner_of[p] = rank
        heapq.heappush(loads, (load + p.numel(), rank))
    return Sharing(group, dist.get_process_group_ranks(group), dist.get_rank(group), owner_of)


def replaced(parameters: Iterable[Tensor]) -> list[int]:
    """Find the indices of parameters that modules have replaced by sharded ones.

    No module holds such a parameter, while some module holds another DTensor of the same shape.
    All modules in memory are searched.
    """
    mine = list(parameters)
    ids = {id(p) for p in mine}
    held: set[int] = set()
    shapes: set[torch.Size] = set()
    for thing in gc.get_objects():
        if not issubclass(type(thing), nn.Module):
            continue
        for p in thing.__dict__.get("_parameters", {}).values():
            if p is None:
                continue
            held.add(id(p))
            if is_sharded(p) and id(p) not in ids:
                shapes.add(p.shape)
    return [i for i, p in enumerate(mine) if id(p) not in held and p.shape in shapes]
