"""Meta-training of controllers: courses, spans and steps, and runs that stop and go on."""

import dataclasses
import json
import math
import signal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.meta_training import FAMILIES, TINY, little, train, trainer_of
from support.ranks import Ranks
from support.stop import check_resumes, same_state

from l2o_graph import NGOptimizer
from l2o_graph.optim.checkpoints import load_checkpoint, save_controller
from l2o_graph.optim.controller import Controller, ControllerConfig
from meta_train import evolution
from meta_train.controller_training import ControllerTrainer, EvolutionConfig, scores_of_all
from meta_train.course import MOST_LOSS, Course


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Where nothing lies, so that images are those of the packaged sample."""
    return tmp_path_factory.mktemp("data") / "nothing"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody stopped; tests read it alone."""
    return train(TINY, data, tmp_path_factory.mktemp("runs") / "whole")


def records(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def without_times(log):
    return [{**record, "seconds": 0} for record in records(log)]


def with_(config: EvolutionConfig, **changes) -> EvolutionConfig:
    with little():
        return dataclasses.replace(config, **changes)


# A run ------------------------------------------------------------------------------------------


def test_a_run_leaves_a_checkpoint_that_trains_networks(data, whole):
    assert whole.finished and whole.checkpoint is not None
    stored = load_checkpoint(whole.checkpoint)
    assert stored.controller.config == TINY.controller
    assert stored.provenance["config"]["pairs"] == 2
    assert stored.provenance["outer_steps"] == TINY.outer_steps
    state = load_file(whole.state)
    start_of_all = trainer_of(TINY, data).weights
    halfway = (start_of_all + state["average"]) / 2
    torch.testing.assert_close(stored.controller.vector(), halfway)
    assert not torch.equal(state["average"], state["weights"])
    assert (state["weights"] - start_of_all).abs().max() > 1e-3
    module = torch.nn.Linear(3, 2)
    before = module.weight.detach().clone()
    module(torch.ones(1, 3)).sum().backward()
    NGOptimizer(module.parameters(), checkpoint=whole.checkpoint).step()
    assert not torch.equal(before, module.weight)

    lines = records(whole.log)
    steps = [line for line in lines if "loss" in line]
    assert [line["outer_step"] for line in steps] == list(range(1, 9))
    assert [line["family"] for line in steps] == list(FAMILIES) * 4
    assert all(math.isfinite(line["loss"]) and line["difference"] > 0 for line in steps)
    evaluated = [line for line in lines if "score" in line]
    assert [line["outer_step"] for line in evaluated] == [0, 5, 8]
    for line in evaluated:
        assert set(line["scores"]) == {*FAMILIES, "pinn"}
        assert line["held_out_score"] == line["scores"]["pinn"]
        mean = sum(line["scores"][family] for family in FAMILIES) / len(FAMILIES)
        assert line["score"] == pytest.approx(mean)


def test_killed_it_resumes_to_the_same_weights(tmp_path, data, whole):
    module = "support.meta_training"
    check_resumes(train, ControllerTrainer, module, data, tmp_path, records, whole)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(data):
    runs = []
    for seed in (0, 0, 1):
        trainer = trainer_of(with_(TINY, seed=seed), data)
        runs.append([{**trainer.advance(), "seconds": 0} for _ in range(4)])
    assert runs[0] == runs[1] != runs[2]


def test_ctrl_c_ends_it_after_the_step_it_is_in_with_the_state_saved(
    tmp_path, data, whole, monkeypatch
):
    advance = ControllerTrainer.advance

    def interrupted(trainer):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(ControllerTrainer, "advance", interrupted)
        broken = train(TINY, data, tmp_path / "broken")
    assert not broken.finished and broken.steps == 3  # which is not one of those that are saved
    resumed = train(TINY, data, tmp_path / "broken", resume=True)
    assert resumed.finished
    assert same_state(whole.state, resumed.state)
    assert without_times(whole.log) == without_times(resumed.log)


def test_the_state_holds_everything(tmp_path, data):
    trainer = trainer_of(TINY, data)
    for _ in range(3):
        trainer.advance()
    trainer.save(tmp_path / "state.safetensors")
    with little():
        again = ControllerTrainer.resume(tmp_path / "state.safetensors", data)
    for _ in range(6):
        expected, found = trainer.advance(), again.advance()
        assert {**expected, "seconds": 0} == {**found, "seconds": 0}
    assert torch.equal(trainer.weights, again.weights)
    assert torch.equal(trainer.average, again.average)


# Several processes ------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
def test_two_processes_come_to_what_one_does(tmp_path, data):
    config = with_(TINY, pairs=4, outer_steps=6, evaluate_every=6)
    alone = train(config, data, tmp_path / "alone")
    ranks = Ranks(tmp_path)
    first, second = ranks.call(train, config, data, tmp_path / "both")
    ranks.end()
    assert first.finished and second.state.parent == tmp_path / "both" / "process-1"
    one, other, expected = (load_file(run.state) for run in (first, second, alone))
    assert torch.equal(one["weights"], other["weights"])
    torch.testing.assert_close(one["weights"], expected["weights"], rtol=0, atol=1e-6)
    for key in (k for k in expected if k.endswith(".parameter")):  # half of the pairs each
        both = torch.cat([one[key], other[key]])
        torch.testing.assert_close(both, expected[key], rtol=1e-3, atol=1e-5)


def test_alone_scores_are_ones_own():
    scores = torch.randn(2, 4)
    assert scores_of_all(scores) is scores


# Outer steps ------------------------------------------------------------------------------------


def linear(monkeypatch, slope):
    """Networks whose loss is exp(slope x weights) of their controller."""

    def span(course, config, weights, steps):
        course.age += min(steps, course.draw.length - course.age)
        vectors = torch.cat([w.flatten(1) for w in weights.values()], 1)
        return (vectors @ slope).exp().expand(2, -1)

    monkeypatch.setattr(Course, "span", span)


def test_weights_go_down_the_slope_of_the_scores(data, monkeypatch):
    trainer = trainer_of(with_(TINY, pairs=16, weight_decay=0.0, outer_steps=100, lr=0.1), data)
    slope = torch.zeros(TINY.controller.size)
    slope[3], slope[7] = 0.1, -0.1
    linear(monkeypatch, slope)
    before = trainer.weights.clone()
    for _ in range(20):
        trainer.advance()
    way = trainer.weights - before
    assert way[3] < -0.05 and way[7] > 0.05


def test_the_first_step_is_that_of_the_estimate_by_hand(data, monkeypatch):
    """Half the difference of each pair's scores, times its noise, less where courses begin."""
    config = with_(TINY, weight_decay=0.0, warmup=1, longest=20, shortest=20)
    trainer = trainer_of(config, data)
    slope = torch.linspace(-0.1, 0.1, config.controller.size)
    linear(monkeypatch, slope)
    noise = evolution.perturbations(trainer.courses[0].draw.seed, 2, config.controller.size)
    before = trainer.weights.clone()
    trainer.advance()
    halves = [config.deviation * (e @ slope).item() for e in noise]
    mean = sum(map(abs, halves)) / 2
    expected = sum(h / mean * e for h, e in zip(halves, noise, strict=True)) / 2
    part = config.span / 20  # of the course that is over by then
    velocity = part * expected / 20  # of an average that begins at 0
    torch.testing.assert_close(trainer.velocity, velocity, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(trainer.weights, before - config.lr * velocity)


def test_the_average_is_of_the_last_steps(data):
    trainer = trainer_of(TINY, data)
    expected = trainer.weights.clone()
    for step in range(1, 6):
        trainer.advance()
        expected = expected + (trainer.weights - expected) / min(step, TINY.average)
        torch.testing.assert_close(trainer.average, expected)


def test_the_rate_warms_up_and_falls_as_a_cosine(data, monkeypatch):
    trainer = trainer_of(with_(TINY, warmup=4), data)
    linear(monkeypatch, torch.zeros(TINY.controller.size))
    rates = [trainer.advance()["lr"] / TINY.lr for _ in range(8)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


def test_courses_are_of_whole_spans_long_and_short_alike(data):
    trainer = trainer_of(with_(TINY, longest=500, told=0.3), data)
    drawn = [trainer._draw("regression") for _ in range(600)]
    lengths = [d.length for d in drawn]
    assert all(length % TINY.span == 0 for length in lengths)
    assert min(lengths) == TINY.shortest and 400 < max(lengths) <= 500
    middle = sum(length < 50 for length in lengths) / 600  # the geometric mean of 5 and 500
    assert 0.4 < middle < 0.6
    assert 0.2 < sum(d.told for d in drawn) / 600 < 0.4
    assert len({d.seed for d in drawn}) == 600


def test_it_may_begin_with_what_another_run_has_learned(tmp_path, data):
    controller = Controller(TINY.controller)
    save_controller(tmp_path / "first.safetensors", controller, {})
    config = with_(TINY, initial=str(tmp_path / "first.safetensors"))
    assert torch.equal(trainer_of(config, data).weights, controller.vector())
    with pytest.raises(ValueError, match=r"initial: expected a checkpoint of .*channels=3"):
        trainer_of(with_(config, controller=ControllerConfig(channels=3)), data)


def test_a_course_that_is_over_or_lost_makes_room_for_another(data, monkeypatch):
    trainer = trainer_of(with_(TINY, shortest=10, longest=10), data)
    first = list(trainer.courses)
    for expected in (True, False):  # two turns of each of the two families
        for turn in range(2):
            trainer.advance()
            assert (trainer.courses[turn] is first[turn]) == expected
    kept = trainer.courses[0]

    def lost(course, config, weights, steps):
        course.age += 1
        return torch.full((2, 4), MOST_LOSS)

    monkeypatch.setattr(Course, "span", lost)
    assert trainer.advance()["lost"] == 1.0
    assert trainer.courses[0] is not kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "fmnist"}, r"task: expected one of \['fmnist_cnn', 'general'.*found 'fmnist'"),
        ({"pairs": 0}, "pairs: expected at least 1, found 0"),
        ({"span": 0}, "span: expected at least 1, found 0"),
        ({"average": 0}, "average: expected at least 1, found 0"),
        ({"deviation": 0.0}, "deviation: expected more than 0, found 0.0"),
        ({"lr": -1.0}, "lr: expected more than 0, found -1.0"),
        ({"lr": math.nan}, "lr: expected a finite number, more than 0, found nan"),
        ({"outer_steps": -1}, "outer_steps: expected at least 0, found -1"),
        ({"longest": 3}, "longest: expected at least shortest = 5, found 3"),
        ({"told": 1.5}, "told: expected from 0 to 1, found 1.5"),
    ],
)
def test_what_makes_no_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        with_(TINY, **changes)


def test_a_run_is_not_mistaken_for_another(tmp_path, data):
    short = with_(TINY, outer_steps=2)
    train(short, data, tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds a run already; resume it"):
        train(short, data, tmp_path / "run")
    with pytest.raises(ValueError, match="another configuration: span is 5, not 4"):
        train(with_(short, span=4), data, tmp_path / "run", resume=True)


def test_without_outer_steps_the_checkpoint_is_the_untrained_controller(tmp_path, data):
    result = train(with_(TINY, outer_steps=0), data, tmp_path / "run")
    assert result.finished and result.checkpoint is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY.seed)
        expected = Controller(TINY.controller).vector()
    assert torch.equal(load_checkpoint(result.checkpoint).controller.vector(), expected)
