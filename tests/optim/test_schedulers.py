"""Every scheduler of PyTorch drives the rate, and the rate that it sets is the one used."""

import copy

import pytest
import torch
from support.optimizers import controller_file, copies, equal, mlp, run
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from l2o_graph.optim.optimizer import NGOptimizer


@pytest.fixture(scope="module", params=["none", "messages"])
def checkpoint(request, tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("zoo"), reader=request.param)


@pytest.fixture(scope="module")
def graph_checkpoint(tmp_path_factory):
    return controller_file(tmp_path_factory.mktemp("graph"))


SCHEDULERS = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 2, cycle_momentum=False),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, 8, cycle_momentum=False),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.1, anneal_epochs=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
}


def run_scheduled(optimizer, scheduler, steps) -> list[float]:
    """Steps with seeded gradients at a loss that never falls; the rate of each."""
    rates = []
    for seed in steps:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        run(optimizer, [seed])
        scheduler.step(*[1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
    return rates


def check_against_rates_set_by_hand(name, rate, checkpoint) -> None:
    """Once driven by the scheduler, once set by hand to what the scheduler makes of SGD."""
    model, twin = mlp(), mlp()
    sgd = torch.optim.SGD(mlp().parameters(), rate())
    optimizer = NGOptimizer(model.parameters(), rate(), 0.1, checkpoint=checkpoint)
    rates = run_scheduled(sgd, SCHEDULERS[name](sgd), range(4))
    assert run_scheduled(optimizer, SCHEDULERS[name](optimizer), range(4)) == rates
    assert len(set(rates)) > 1
    by_hand = NGOptimizer(twin.parameters(), weight_decay=0.1, checkpoint=checkpoint)
    for seed, rate in enumerate(rates):
        by_hand.param_groups[0]["lr"] = rate
        run(by_hand, [seed])
    assert equal(model.parameters(), twin.parameters())


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rate", [lambda: 1.0, lambda: torch.tensor(1.0)], ids=["float", "tensor"])
def test_a_schedule_is_that_of_any_optimizer(name, rate, graph_checkpoint):
    check_against_rates_set_by_hand(name, rate, graph_checkpoint)


@pytest.mark.parametrize("name", ["OneCycleLR", "ReduceLROnPlateau"])
def test_every_model_follows_a_schedule(name, checkpoint):
    check_against_rates_set_by_hand(name, lambda: 1.0, checkpoint)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_optimizer_and_scheduler_resume_together(name, graph_checkpoint, tmp_path):
    """What schedulers add to the groups goes through a file without pickles, too."""
    model, other = mlp(), mlp(seed=1)
    optimizer = NGOptimizer(model.parameters(), checkpoint=graph_checkpoint)
    resumed = NGOptimizer(other.parameters(), checkpoint=graph_checkpoint)
    scheduler, then = SCHEDULERS[name](optimizer), SCHEDULERS[name](resumed)
    run_scheduled(optimizer, scheduler, range(2))
    other.load_state_dict(model.state_dict())
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    then.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    rates = run_scheduled(optimizer, scheduler, range(2, 5))
    assert run_scheduled(resumed, then, range(2, 5)) == rates
    assert equal(model.parameters(), other.parameters())


def test_each_group_follows_a_schedule_of_its_own(graph_checkpoint):
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    optimizer = NGOptimizer(groups, checkpoint=graph_checkpoint)
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: float(step == 0)])
    run_scheduled(optimizer, scheduler, range(1))
    before = copies(model.parameters())
    run_scheduled(optimizer, scheduler, range(1, 3))
    assert not any(
        torch.equal(a, b) for a, b in zip(before[:2], model[0].parameters(), strict=True)
    )
    assert equal(before[2:], model[2].parameters()), "their rate has fallen to 0"


@pytest.mark.parametrize("make", [lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR])
def test_there_is_no_momentum_to_cycle(make, graph_checkpoint):
    """The averages have fixed decays: a scheduler that would turn them has to be told not to."""
    optimizer = NGOptimizer(mlp().parameters(), checkpoint=graph_checkpoint)
    with pytest.raises(ValueError, match="optimizer must support momentum"):
        make(optimizer, 0.1, 8)
