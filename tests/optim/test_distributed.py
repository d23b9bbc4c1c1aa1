"""Two processes on gloo: replicas that stay equal, checkpoints of both, and refusals."""

import functools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.checkpoint import load_folder, save_folder
from support.optimizers import cnn, controller_file, copies, equal, mlp, state_tensors
from support.ranks import RANKS
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from l2o_graph.optim.optimizer import NGOptimizer

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

STEPS = 12


@pytest.fixture(scope="module", params=["messages", "attention"])
def checkpoint(request, tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"), reader=request.param)


@pytest.fixture(scope="module")
def graph_checkpoint(tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("graph"))


def batch(rank: int, step: int, shape: tuple[int, ...] = (4,)) -> tuple[Tensor, Tensor]:
    """Other data for each process and step."""
    generator = torch.Generator().manual_seed(2 * step + rank)
    return torch.randn(8, *shape, generator=generator), torch.arange(8) % 3


def new(model: nn.Module, checkpoint: Path, how: str = "plain") -> NGOptimizer:
    parameters = model.named_parameters() if how == "named" else model.parameters()
    told = model if how == "model" else None
    return NGOptimizer(parameters, weight_decay=0.1, model=told, checkpoint=checkpoint)


def backward(model: nn.Module, rank: int, step: int, shape: tuple[int, ...] = (4,)) -> None:
    x, y = batch(rank, step, shape)
    nn.functional.cross_entropy(model(x), y).backward()


def train(
    model: nn.Module, optimizer: NGOptimizer, steps: range, shape: tuple[int, ...] = (4,)
) -> list[Tensor]:
    """What one process does; how its parameters and its state end up."""
    for step in steps:
        optimizer.zero_grad()
        backward(model, dist.get_rank(), step, shape)
        optimizer.step()
    return outcome(model, optimizer)


def outcome(model: nn.Module, optimizer: NGOptimizer) -> list[Tensor]:
    return copies([*model.parameters(), *state_tensors(optimizer)])


@functools.cache
def alone(checkpoint: Path, parts: int = 1) -> list[Tensor]:
    """One process that sees the batches of both: what two replicas should come to.

    Its parameters come in a list, so that no examples are counted, as on several processes.
    """
    model = mlp()
    optimizer = NGOptimizer(list(model.parameters()), weight_decay=0.1, checkpoint=checkpoint)
    for step in range(STEPS):
        gradients = []
        for rank in RANKS:
            optimizer.zero_grad()
            for part in range(parts):
                backward(model, rank, step * parts + part)
            gradients.append([p.grad / len(RANKS) for p in model.parameters()])
        for p, *of_ranks in zip(model.parameters(), *gradients, strict=True):
            p.grad = sum(of_ranks)
        optimizer.step()
    return outcome(model, optimizer)


# DistributedDataParallel -----------------------------------------------------------------------


def _train(checkpoint: Path, how: str = "plain", wrapped: bool = True, **options) -> list[Tensor]:
    model = mlp()
    used = DistributedDataParallel(model, **options) if wrapped else model
    return train(used, new(used, checkpoint, how), range(STEPS))


def test_replicas_stay_equal_to_the_bit_and_to_one_process(checkpoint, on_both):
    one, other = on_both(_train, checkpoint)
    assert equal(one, other)
    assert equal(one, alone(checkpoint))


def test_without_ddp_they_part(checkpoint, on_both):
    one, other = on_both(_train, checkpoint, wrapped=False)
    assert not any(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


@pytest.mark.parametrize("how", ["named", "model"])
def test_names_and_the_wrapper_as_model_are_understood(how, graph_checkpoint, on_both):
    one, other = on_both(_train, graph_checkpoint, how)
    assert equal(one, other)
    assert equal(one, alone(graph_checkpoint))


@pytest.mark.parametrize("option", ["gradient_as_bucket_view", "static_graph"])
def test_options_of_ddp_change_nothing(option, graph_checkpoint, on_both):
    one, other = on_both(_train, graph_checkpoint, **{option: True})
    assert equal(one, other)
    assert equal(one, alone(graph_checkpoint))


class _Skipping(nn.Module):
    """Leaves layers of a residual stream out, other ones in each process and step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head, self.aux, self.calls = nn.Linear(4, 3), nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.head(x)
        self.calls += 1
        for i in (self.calls + dist.get_rank(), self.calls // 2):
            x = x + self.layers[i % 4](x).tanh()
        return self.head(x) + self.aux(x)


def _skip(checkpoint: Path, validates: bool) -> list[Tensor]:
    model = _Skipping()
    used = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = new(model, checkpoint, "model")
    if validates and dist.get_rank() == 0:
        with torch.no_grad():
            model.eval()(batch(0, 0)[0])
        model.train()
    ends = train(used, optimizer, range(6))
    assert optimizer._structure.traced is not None and optimizer._structure.traced.loose == ()
    return ends


@pytest.mark.parametrize("validates", [False, True])
def test_replicas_that_see_other_parts_of_the_network_stay_equal(
    validates, graph_checkpoint, on_both
):
    assert equal(*on_both(_skip, graph_checkpoint, validates))


class _Branches(nn.Module):
    """A trunk and three heads; each process uses one of the first two, and nobody the third."""

    def __init__(self):
        super().__init__()
        self.trunk = mlp()
        self.heads = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[dist.get_rank()](self.trunk(x))


def _train_branches(checkpoint: Path, bucket_view: bool) -> tuple[list[Tensor], list[bool], int]:
    model = _Branches()
    before = copies(model.parameters())
    used = DistributedDataParallel(
        model, find_unused_parameters=True, gradient_as_bucket_view=bucket_view
    )
    optimizer = new(used, checkpoint)
    after = train(used, optimizer, range(STEPS))
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    return after, moved, len(optimizer.state)


@pytest.mark.parametrize("bucket_view", [False, True])
def test_unused_parameters(bucket_view, graph_checkpoint, on_both):
    (one, moved, states), (other, *_) = on_both(_train_branches, graph_checkpoint, bucket_view)
    assert equal(one, other)
    assert moved == [True] * 8 + [False] * 2, "what no process uses stays as it is"
    assert states == 8


def _accumulate(checkpoint: Path, parts: int) -> list[Tensor]:
    used = DistributedDataParallel(mlp())
    optimizer = new(used, checkpoint)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            with nullcontext() if part == parts - 1 else used.no_sync():
                backward(used, dist.get_rank(), step * parts + part)
        optimizer.step()
    return outcome(used, optimizer)


def test_gradients_may_be_accumulated_before_they_are_shared(graph_checkpoint, on_both):
    one, other = on_both(_accumulate, graph_checkpoint, 2)
    assert equal(one, other)
    assert equal(one, alone(graph_checkpoint, parts=2))


def _train_with_batch_norm(checkpoint: Path) -> list[Tensor]:
    used = DistributedDataParallel(cnn())
    return train(used, new(used, checkpoint), range(STEPS), (1, 9, 9))


def test_replicas_of_a_convolutional_network_stay_equal(checkpoint, on_both):
    one, other = on_both(_train_with_batch_norm, checkpoint)
    assert equal(one, other)


# Checkpoints -----------------------------------------------------------------------------------


def _save(checkpoint: Path, folder: Path, how: str) -> tuple[list[Tensor], list[Tensor]]:
    used = DistributedDataParallel(mlp())
    optimizer = new(used, checkpoint, how)
    saved = train(used, optimizer, range(3))
    save_folder(used, optimizer, folder)
    return saved, train(used, optimizer, range(3, 6))


def _resume(checkpoint: Path, folder: Path, how: str) -> list[Tensor]:
    used = DistributedDataParallel(mlp(seed=1))
    optimizer = new(used, checkpoint, how)
    load_folder(used, optimizer, folder)
    return train(used, optimizer, range(3, 6))


# A process that is in no group reads alone, as it should here.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("how", ["plain", "named", "model"])
def test_a_distributed_checkpoint_resumes_to_the_bit(how, graph_checkpoint, on_both, tmp_path):
    (saved, one), (_, other) = on_both(_save, graph_checkpoint, tmp_path, how)
    assert equal(one, other) and not equal(saved, one)
    for resumed in on_both(_resume, graph_checkpoint, tmp_path, how):
        assert equal(resumed, one)

    model = mlp(seed=1)
    optimizer = new(model, graph_checkpoint, how)
    load_folder(model, optimizer, tmp_path)
    assert equal(outcome(model, optimizer), saved), "saved by two processes, read by one"


# Shards ----------------------------------------------------------------------------------------


def _refusal(act) -> str:
    try:
        act()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _flatten(checkpoint: Path, original: bool) -> str:
    model = FullyShardedDataParallel(mlp(), use_orig_params=original, device_id=torch.device("cpu"))
    return _refusal(lambda: new(model, checkpoint))


@pytest.mark.parametrize("original", [False, True])
def test_flattened_parameters_are_refused(original, graph_checkpoint, on_both):
    """The first FSDP: its parameters look like whole vectors."""
    for answer in on_both(_flatten, graph_checkpoint, original):
        assert "TypeError: parameter 0: expected a whole tensor or a DTensor of fully" in answer
        assert "found a shard of FullyShardedDataParallel" in answer


def _share_out(checkpoint: Path, with_model: bool) -> str:
    model = mlp()
    told = {"model": model} if with_model else {}
    return _refusal(
        lambda: ZeroRedundancyOptimizer(
            model.parameters(), NGOptimizer, lr=1.0, checkpoint=checkpoint, **told
        )
    )


@pytest.mark.parametrize("with_model", [False, True])
def test_shares_of_parameters_are_refused(with_model, graph_checkpoint, on_both):
    """ZeroRedundancyOptimizer makes an optimizer of each process for some of them."""
    for answer in on_both(_share_out, graph_checkpoint, with_model):
        assert "TypeError: NGOptimizer: expected all parameters of a network" in answer
        assert "those of one process inside ZeroRedundancyOptimizer" in answer
