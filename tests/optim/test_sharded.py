"""Two processes on gloo, parameters sharded over them: equal to one process, saved, refused."""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.checkpoint import load_folder, save_folder
from support.optimizers import controller_file, copies, equal, mlp, random_checkpoint
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

from l2o_graph import PaperOptimizer
from l2o_graph.optim.optimizer import NGOptimizer

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"),
        reason="fully_shard of this torch, as of 2.6, runs on no CPU",
    ),
]

STEPS = 12  # roots are renewed in the first, second, fourth, seventh and eleventh
CLOSE = 1e-5


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
    optimizer = NGOptimizer(parameters, weight_decay=0.1, model=told, checkpoint=checkpoint)
    optimizer._examples.is_over = True  # several processes count none, so neither does their twin
    return optimizer


def train(
    model: nn.Module, optimizer: NGOptimizer, steps: range, rank: int | None = None
) -> list[Tensor]:
    """Train on a batch, or on a rank's half of it; the weights that come of it."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 4, generator=generator), torch.arange(16) % 3
        x = x.to(next(model.parameters()).dtype)
        if rank is not None:
            x, y = x.chunk(2)[rank], y.chunk(2)[rank]
        optimizer.zero_grad()
        found = model(x, step) if takes_step(model) else model(x)
        nn.functional.cross_entropy(found, y).backward()
        optimizer.step()
    return whole(model.parameters())


def takes_step(model: nn.Module) -> bool:
    return isinstance(getattr(model, "module", model), tuple(KINDS))


def whole(tensors: Iterable[Tensor]) -> list[Tensor]:
    return copies(t.full_tensor() if isinstance(t, DTensor) else t for t in tensors)


def state_of(optimizer: NGOptimizer) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    return whole(state[key][name] for key in sorted(state) for name in sorted(state[key]))


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True) if a.numel())


# Equal to one process --------------------------------------------------------------------------


def _train_kind(kind: type[nn.Module], checkpoint: Path) -> tuple[list[Tensor], ...]:
    model = sharded(made(kind))
    optimizer = new(model, checkpoint)
    weights = train(model, optimizer, range(STEPS), dist.get_rank())
    return weights, state_of(optimizer)


def _replicate_kind(kind: type[nn.Module], checkpoint: Path) -> tuple[list[Tensor], ...]:
    model = made(kind).to(memory_format=torch.channels_last)
    used = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = new(used, checkpoint)
    weights = train(used, optimizer, range(STEPS), dist.get_rank())
    return weights, state_of(optimizer)


@functools.cache
def _alone(kind: type[nn.Module], checkpoint: Path) -> tuple[list[Tensor], list[torch.Size]]:
    """Weights of one process, and the shapes of its state."""
    model = made(kind)
    optimizer = new(model, checkpoint)
    weights = train(model, optimizer, range(STEPS))
    return weights, [t.shape for t in state_of(optimizer)]


@pytest.mark.parametrize("work", [_train_kind, _replicate_kind], ids=["fsdp2", "ddp"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_equal_and_one_process(kind, work, checkpoint, on_both):
    (one, state), (other, state_of_other) = on_both(work, kind, checkpoint)
    assert equal(one, other) and equal(state, state_of_other)
    weights, shapes = _alone(kind, checkpoint)
    assert gap(one, weights) < CLOSE
    assert [t.shape for t in state] == shapes


def _share_work(checkpoint: Path) -> tuple[int, int]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)), nn.Linear(16, 3))
    fully_shard(model)
    optimizer = new(model, checkpoint)
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    held = [t for of_one in optimizer.state.values() for t in of_one.values()]
    saved = [t for of_one in optimizer.state_dict()["state"].values() for t in of_one.values()]
    here = sum(t.numel() for t in held if not t.is_meta)
    return here, sum(t.numel() for t in saved)


def test_state_is_shared_out(checkpoint, on_both):
    (one, all_of_it), (other, _) = on_both(_share_work, checkpoint)
    assert max(one, other) < 0.6 * all_of_it


READERS = ["attention", "mean", "sequence", "none"]


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_hears_the_whole_network(reader, tmp_path, on_both):
    file = controller_file(tmp_path, reader=reader)
    (one, _), _ = on_both(_train_kind, Tied, file)
    model = made(Tied)
    assert gap(one, train(model, new(model, file), range(STEPS))) < CLOSE


def _train_narrow(checkpoint: Path) -> tuple[list[Tensor], list[int]]:
    model = fully_shard(nn.Sequential(made(_narrow), nn.Tanh()))
    optimizer = new(model, checkpoint)
    weights = train(model, optimizer, range(STEPS))
    return weights, [int(t.is_meta) for t in next(iter(optimizer.state.values())).values()]


def _narrow() -> nn.Module:
    return nn.Linear(4, 3, bias=False).bfloat16()


def test_a_rank_may_own_nothing_and_low_precision_is_rounded_once(checkpoint, on_both):
    (one, absent), (other, absent_on_other) = on_both(_train_narrow, checkpoint)
    model = nn.Sequential(made(_narrow), nn.Tanh())
    assert equal(one, other)
    assert equal(one, train(model, new(model, checkpoint), range(STEPS)))
    assert not any(absent) and any(absent_on_other)


def _train_wide(checkpoint: Path) -> list[Tensor]:
    model = fully_shard(_wide())
    return train(model, new(model, checkpoint, "named"), range(40), dist.get_rank())


def _wide() -> nn.Module:
    torch.manual_seed(0)
    sizes = (4, 260, 260, 260, 3)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).double()


def test_matrices_of_one_kind_on_several_ranks_take_turns_as_on_one(checkpoint, on_both):
    """Powers of long sides are renewed at other steps for each matrix of a stack."""
    one, _ = on_both(_train_wide, checkpoint)
    model = _wide()
    alone = train(model, new(model, checkpoint, "named"), range(40))
    assert gap(one, alone) < 1e-9


def _parallelise(checkpoint: Path, plan: dict, dims: tuple[int, ...]) -> tuple[list[Tensor], str]:
    model = mlp()
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("data", "tensor")[-len(dims) :])
    parallelize_module(model, mesh["tensor"], plan)
    if len(dims) > 1:
        fully_shard(model, mesh=mesh["data"])
    half = dist.get_rank() if dims == (2, 1) else None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = new(model, checkpoint)
        train(model, optimizer, range(4), half)
        optimizer.load_state_dict(optimizer.state_dict())
        weights = train(model, optimizer, range(4, 8), half)
    return weights, "\n".join(str(w.message) for w in said)


BY_COLUMNS_AND_ROWS = {"0": ColwiseParallel(), "2": RowwiseParallel()}
BY_COLUMNS = {"0": ColwiseParallel(output_layouts=Replicate())}


@pytest.mark.parametrize(
    "plan, dims",
    [(BY_COLUMNS_AND_ROWS, (2,)), (BY_COLUMNS, (2,)), (BY_COLUMNS_AND_ROWS, (1, 2)),
     (BY_COLUMNS, (2, 1))],
)  # fmt: skip
def test_tensor_parallel_is_one_process(plan, dims, checkpoint, on_both):
    """Of one axis, and with FSDP2 along the other; one plan leaves a layer as it was."""
    (one, said), (other, _) = on_both(_parallelise, checkpoint, plan, dims)
    model = mlp()
    assert equal(one, other)
    assert gap(one, train(model, new(model, checkpoint), range(8))) < CLOSE
    assert "its structure is inferred from the order of its layers" in said


def _replicate_and_shard(checkpoint: Path) -> list[Tensor]:
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "shard")))
    return train(model, new(model, checkpoint), range(STEPS), dist.get_rank())


def test_replicas_of_shards_are_one_process(checkpoint, on_both):
    one, other = on_both(_replicate_and_shard, checkpoint)
    model = mlp()
    assert equal(one, other)
    assert gap(one, train(model, new(model, checkpoint), range(STEPS))) < CLOSE


def _look(checkpoint: Path) -> tuple[list[Tensor], list[Tensor], str]:
    model = sharded(mlp())
    optimizer = new(model, checkpoint)
    weights = train(model, optimizer, range(STEPS), dist.get_rank())
    with optimizer.averaged():
        averages = whole(model.parameters())
    assert equal(weights, whole(model.parameters()))
    return weights, averages, str(optimizer.explain())


def test_averages_and_the_account_are_those_of_one_process(checkpoint, on_both):
    (_, averages, account), (_, of_other, account_of_other) = on_both(_look, checkpoint)
    model = mlp()
    optimizer = new(model, checkpoint)
    train(model, optimizer, range(STEPS))
    with optimizer.averaged():
        assert gap(averages, whole(model.parameters())) < CLOSE
    assert equal(averages, of_other)
    assert account == account_of_other == str(optimizer.explain())


def _overflow(checkpoint: Path) -> tuple[list[Tensor], list[Tensor], list[str]]:
    model = sharded(mlp())
    optimizer = new(model, checkpoint)
    before = train(model, optimizer, range(2), dist.get_rank())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for p in model.parameters():
            if dist.get_rank():
                p.grad.to_local()[:1] = torch.nan
        optimizer.step()
    return before, whole(model.parameters()), [str(w.message) for w in said]


def test_what_is_not_finite_on_one_rank_changes_nothing_on_any(checkpoint, on_both):
    for before, after, said in on_both(_overflow, checkpoint):
        assert equal(before, after)
        assert any("a gradient is not finite" in message for message in said)


def _part_ways(checkpoint: Path) -> str:
    model = sharded(made(Turns))
    optimizer = new(model, checkpoint, "plain")
    train(model, optimizer, range(2), dist.get_rank())
    if dist.get_rank():
        model.heads[1].bias.grad = None
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "none"


def test_gradients_of_some_ranks_alone_are_refused(checkpoint, on_both):
    for answer in on_both(_part_ways, checkpoint):
        assert "parameter 5: expected a gradient on all ranks or on none" in answer


# Made too early --------------------------------------------------------------------------------


def _too_early(checkpoint: Path, how: str, part: bool) -> tuple[str, list[Tensor], list[Tensor]]:
    model = mlp()
    optimizer = new(model, checkpoint, how)
    fully_shard(model[2] if part else model)
    try:
        train(model, optimizer, range(1), dist.get_rank())
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("how", ["plain", "model"])
@pytest.mark.parametrize("part", [False, True])
def test_optimizers_from_before_fully_shard_say_so(how, part, checkpoint, on_both):
    for answer in on_both(_too_early, checkpoint, how, part):
        assert answer.startswith(f"parameter {2 if part else 0}: expected one of the network")
        assert "create the optimizer after fully_shard or parallelize_module" in answer


def _too_early_for_tensor_parallel(checkpoint: Path) -> str:
    model = mlp()
    optimizer = new(model, checkpoint, "plain")
    parallelize_module(model, init_device_mesh("cpu", (2,)), BY_COLUMNS_AND_ROWS)
    try:
        train(model, optimizer, range(1))
    except RuntimeError as error:
        return str(error)
    return "none"


def test_optimizers_from_before_parallelize_module_say_so(checkpoint, on_both):
    for answer in on_both(_too_early_for_tensor_parallel, checkpoint):
        assert "create the optimizer after fully_shard or parallelize_module" in answer


def _no_gradients(checkpoint: Path) -> int:
    kept = [sharded(mlp()), mlp()]
    optimizer = new(kept[1], checkpoint, "plain")
    optimizer.step()
    return len(optimizer.state)


def test_a_step_without_gradients_beside_a_sharded_network_does_nothing(checkpoint, on_both):
    assert on_both(_no_gradients, checkpoint) == [0, 0]


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


OPTIONS = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def _save_whole(checkpoint: Path) -> tuple[dict, list[Tensor]]:
    model = sharded(mlp())
    optimizer = new(model, checkpoint)
    train(model, optimizer, range(4), dist.get_rank())
    found = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    return found if dist.get_rank() == 0 else {}, state_of(optimizer)


def _load_whole(checkpoint: Path, state: dict) -> list[Tensor]:
    model = sharded(mlp(seed=1))
    optimizer = new(model, checkpoint)
    given = state if dist.get_rank() == 0 else {}
    set_optimizer_state_dict(model, optimizer, given, options=OPTIONS)
    return state_of(optimizer)


def test_a_state_is_put_together_on_one_rank_and_given_out_by_it(checkpoint, on_both):
    (found, state), _ = on_both(_save_whole, checkpoint)
    assert all(type(t) is Tensor for of_one in found["state"].values() for t in of_one.values())
    for loaded in on_both(_load_whole, checkpoint, found):
        assert equal(loaded, state)
    model = mlp(seed=1)
    optimizer = new(model, checkpoint)
    set_optimizer_state_dict(model, optimizer, found)
    assert equal(state_of(optimizer), state), "put together by two processes, read by one"


def _refuse(checkpoint: Path, of_paper: Path) -> list[str]:
    model = sharded(mlp())
    optimizer = new(model, checkpoint)
    train(model, optimizer, range(2), dist.get_rank())
    state = optimizer.state_dict()
    state["state"][0]["momenta"].to_local().fill_(torch.nan)
    answers = []
    for act in (
        lambda: optimizer.load_state_dict(state),
        lambda: PaperOptimizer(model.parameters(), checkpoint=of_paper),
    ):
        try:
            act()
        except (TypeError, ValueError) as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def test_what_is_refused(checkpoint, on_both, tmp_path):
    for of_state, of_paper in on_both(_refuse, checkpoint, random_checkpoint(tmp_path)):
        assert "ValueError: state_dict: for parameter 0, expected finite numbers" in of_state
        assert "TypeError: parameter 0: expected a whole tensor, found a shard" in of_paper
