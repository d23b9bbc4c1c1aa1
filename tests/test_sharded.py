"""Two processes on gloo, parameters sharded over them: what one process does, saved and read anew."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers_checkpoint import load_folder, save_folder
from helpers_optimizer import controller_file, copies, equal, mlp
from helpers_ranks import RANKS, Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from l2o_graph.optim.optimizer import NGOptimizer

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

STEPS = 20
CLOSE = 1e-5


@pytest.fixture(scope="module")
def on_both(tmp_path_factory):
    """Call a function in two processes of one group; what each of them answered."""
    ranks = Ranks(tmp_path_factory.mktemp("group"))
    yield ranks.call
    ranks.end()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"))


# Networks, each told which step it is ----------------------------------------------------------


class Dropping(nn.Module):
    """LayerDrop: layers of a residual stream are left out, others in each step."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = self.first(x)
        for i in (step % 4, (step // 2 + 2) % 4):
            x = x + self.layers[i](x).tanh()
        return self.head(x)


class Turns(nn.Module):
    """Two heads that are used by turns, and one that never is."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(3))

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.heads[step % 2](self.first(x).relu())


class Tied(nn.Module):
    """A language model of a kind: the table of embeddings is the last kernel as well."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor, _: int) -> Tensor:
        known = self.table((10 * x).long() % 7).mean(1)
        return self.head(known + self.mix(known).tanh())


class Frozen(nn.Module):
    """A body of which the first layer is not trained."""

    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(3, 3)
        self.body[0].requires_grad_(False)

    def forward(self, x: Tensor, _: int) -> Tensor:
        return self.head(self.body(x).tanh())


class ChannelsLast(nn.Module):
    """Convolutions of images whose channels lie next to each other."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, _: int) -> Tensor:
        x = x.repeat(1, 32).view(-1, 2, 8, 8).to(memory_format=torch.channels_last)
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


KINDS = [Dropping, Turns, Tied, Frozen, ChannelsLast]


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def sharded(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and not isinstance(model, Tied):
            fully_shard(part)
    return fully_shard(model)


def new(model: nn.Module, checkpoint: Path, how: str = "model") -> NGOptimizer:
    parameters = model.named_parameters() if how == "named" else model.parameters()
    told = model if how == "model" else None
    return NGOptimizer(parameters, weight_decay=0.1, model=told, checkpoint=checkpoint)


def train(
    model: nn.Module, optimizer: NGOptimizer, steps: range, rank: int | None = None
) -> list[Tensor]:
    """Train on a batch, or on a rank's half of it; the weights that come of it."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 4, generator=generator), torch.arange(16) % 3
        if rank is not None:
            x, y = x.chunk(2)[rank], y.chunk(2)[rank]
        optimizer.zero_grad()
        found = model(x) if isinstance(model, nn.Sequential) else model(x, step)
        nn.functional.cross_entropy(found, y).backward()
        optimizer.step()
    return whole(model.parameters())


def whole(tensors: Iterable[Tensor]) -> list[Tensor]:
    return copies(t.full_tensor() if isinstance(t, DTensor) else t for t in tensors)


def state_of(optimizer: NGOptimizer) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    return whole(t for key in sorted(state) for t in state[key].values())


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True) if a.numel())


# Equal to one process --------------------------------------------------------------------------


def _train_kind(kind: type[nn.Module], checkpoint: Path, how: str) -> tuple[list[Tensor], ...]:
    model = sharded(made(kind))
    optimizer = new(model, checkpoint, how)
    weights = train(model, optimizer, range(STEPS), dist.get_rank())
    return weights, state_of(optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_is_one_process(kind, checkpoint, on_both):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (one, state), (other, of_other) = on_both(_train_kind, kind, checkpoint, "model")
    assert equal(one, other) and equal(state, of_other)
    model = made(kind)
    optimizer = new(model, checkpoint)
    alone = train(model, optimizer, range(STEPS))
    print("GAP", kind.__name__, gap(one, alone), gap(state, state_of(optimizer)))
    assert gap(one, alone) < CLOSE


def _parallelise(checkpoint: Path, plan: dict, dims: tuple[int, ...]) -> tuple[list[Tensor], str]:
    model = mlp()
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("data", "tensor")[-len(dims) :])
    parallelize_module(model, mesh["tensor"], plan)
    if len(dims) > 1:
        fully_shard(model, mesh=mesh["data"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = new(model, checkpoint)
        train(model, optimizer, range(4), dist.get_rank() if dims == (2, 1) else None)
        state = optimizer.state_dict()
        train(model, optimizer, range(4, 8), dist.get_rank() if dims == (2, 1) else None)
        optimizer.load_state_dict(state)
    return whole(model.parameters()), "\n".join(str(w.message) for w in said)


BY_COLUMNS_AND_ROWS = {"0": ColwiseParallel(), "2": RowwiseParallel()}
BY_COLUMNS = {"0": ColwiseParallel(output_layouts=Replicate())}


@pytest.mark.parametrize("dims", [(2,), (1, 2), (2, 1)])
@pytest.mark.parametrize("plan", [BY_COLUMNS_AND_ROWS, BY_COLUMNS])
def test_tensor_parallel_is_one_process(dims, plan, checkpoint, on_both):
    """Of one axis, and with FSDP2 along the other; the second plan leaves a layer as it was."""
    (one, said), (other, _) = on_both(_parallelise, checkpoint, plan, dims)
    model = mlp()
    alone = train(model, new(model, checkpoint), range(8))
    print("GAP", dims, gap(one, alone), said[-300:])
    assert equal(one, other)
    assert gap(one, alone) < CLOSE
    assert "its structure is inferred from the order of its layers" in said


def _replicate_and_shard(checkpoint: Path) -> list[Tensor]:
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "shard")))
    return train(model, new(model, checkpoint), range(STEPS), dist.get_rank())
 

def test_hybrid_shards_are_one_process(checkpoint, on_both):
    one, other = on_both(_replicate_and_shard, checkpoint)
    model = mlp()
    print("GAP hsdp", gap(one, train(model, new(model, checkpoint), range(STEPS))))
    assert equal(one, other)


# Saved and read anew ---------------------------------------------------------------------------


def _save(kind: type[nn.Module], checkpoint: Path, folder: Path) -> tuple[list[Tensor], ...]:
    model = sharded(made(kind))
    optimizer = new(model, checkpoint)
    train(model, optimizer, range(4), dist.get_rank())
    save_folder(model, optimizer, folder)
    state = state_of(optimizer)
    return state, train(model, optimizer, range(4, 8), dist.get_rank())


def _load(kind: type[nn.Module], checkpoint: Path, folder: Path) -> tuple[list[Tensor], ...]:
    torch.manual_seed(1)
    model = sharded(kind())
    optimizer = new(model, checkpoint)
    model(torch.zeros(2, 4), 0).sum().backward()  # shows what the state is to look like
    optimizer.zero_grad()
    load_folder(model, optimizer, folder)
    state = state_of(optimizer)
    return state, train(model, optimizer, range(4, 8), dist.get_rank())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("kind", [Frozen, Tied])
def test_a_distributed_checkpoint_is_resharded(kind, checkpoint, on_both, tmp_path):
    (state, after), _ = on_both(_save, kind, checkpoint, tmp_path / "two")
    for loaded, ends in on_both(_load, kind, checkpoint, tmp_path / "two"):
        assert equal(loaded, state) and equal(ends, after)

    torch.manual_seed(1)
    model = kind()
    optimizer = new(model, checkpoint)
    model(torch.zeros(2, 4), 0)
    load_folder(model, optimizer, tmp_path / "two")
    assert equal(state_of(optimizer), state), "saved by two processes, read by one"
    save_folder(model, optimizer, tmp_path / "one")
    assert gap(train(model, optimizer, range(4, 8)), after) < CLOSE

    for loaded, ends in on_both(_load, kind, checkpoint, tmp_path / "one"):
        assert equal(loaded, state), "saved by one process, read by two"
        assert equal(ends, after)
