"""Intervals around predicted accuracies hold, and are not given where nothing speaks for them."""

import itertools
import math
import warnings

import jaxtyping
import pytest
import torch
from torch import nn

from l2o_graph.cnn import (
    AccuracyPrediction,
    GeneralizationPredictor,
    cnn_config,
    predict_accuracy,
    save_cnn_model,
)
from l2o_graph.metanets.intervals import covered, interval_around, residuals_of


def drawn(seed, runs, each):
    """Networks whose logits are off by a number of their run and one of their own."""
    g = torch.Generator().manual_seed(seed)
    count = runs * each
    truth = torch.randn(count, generator=g, dtype=torch.float64) - 1
    of_run = torch.randn(runs, generator=g, dtype=torch.float64).repeat_interleave(each)
    own = torch.randn(count, generator=g, dtype=torch.float64)
    said = truth + 0.2 * of_run + 0.1 * own
    return said.sigmoid(), truth.sigmoid(), torch.arange(runs).repeat_interleave(each)


def slow_ends(predicted, accuracy, run, level, asked):
    """Ends of the interval around one number: networks one by one, nearest first."""
    runs = sorted(set(run.tolist()))
    off = sorted(
        (abs(math.log(p / (1 - p)) - math.log(a / (1 - a))), r)
        for p, a, r in zip(predicted.tolist(), accuracy.tolist(), run.tolist(), strict=True)
    )
    weight = {r: 1 / (len(runs) * run.tolist().count(r)) for r in runs}
    # The next run, infinitely far off, is one of len(runs) + 1; of 200 parts the next whole one.
    needed, sum_of = math.ceil(200 * level * (len(runs) + 1) / len(runs) - 1e-9) / 200, 0.0
    for distance, r in off:
        sum_of += weight[r]
        if sum_of >= needed - 1e-9:
            middle = math.log(asked / (1 - asked))
            return 1 / (1 + math.exp(distance - middle)), 1 / (1 + math.exp(-distance - middle))
    raise AssertionError("no network is far enough off")


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_ends_are_those_of_a_slow_twin(level):
    predicted, accuracy, run = drawn(0, 30, 7)
    keep = torch.rand(len(run), generator=torch.Generator().manual_seed(1)) < 0.7
    predicted, accuracy, run = predicted[keep], accuracy[keep], run[keep]  # runs of unequal size
    asked = torch.tensor([0.1, 0.5, 0.93], dtype=torch.float64)
    low, high = interval_around(asked, level, residuals_of(predicted, accuracy, run))
    for i, number in enumerate(asked.tolist()):
        expected = slow_ends(predicted, accuracy, run, level, number)
        assert (low[i].item(), high[i].item()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_new_runs_lie_inside_as_often_as_was_asked_for(level):
    shares = []
    for seed in range(200):
        residuals = residuals_of(*drawn(seed, 30, 10))
        predicted, accuracy, _ = drawn(10_000 + seed, 20, 10)
        shares.append(covered(predicted, accuracy, level, residuals))
    found = sum(shares) / len(shares)
    # At least the level, and by no more than the one run that is taken to be far off, and a part.
    assert level - 0.01 <= found <= level + 1 / 31 + 1 / 200 + 0.01
    # Networks as if each were a run of its own promise too much.
    predicted, accuracy, run = drawn(0, 30, 10)
    alone = residuals_of(predicted, accuracy, torch.arange(len(run)))
    assert alone["runs"] == 300 and residuals_of(predicted, accuracy, run)["runs"] == 30


def test_a_run_weighs_as_much_as_another_whatever_it_holds():
    accuracy = torch.full((11,), 0.5)
    predicted = torch.tensor([0.5] * 10 + [0.9])
    run = torch.tensor([0] * 10 + [1])
    widths = residuals_of(predicted, accuracy, run)["widths"]
    assert len(widths) == 200 and widths[99] == 0
    assert widths[100] == pytest.approx(math.log(9), abs=1e-5)


def test_intervals_grow_with_the_level_and_stay_within_0_and_1():
    residuals = residuals_of(*drawn(0, 40, 5))
    asked = torch.tensor([0.001, 0.1, 0.5, 0.999])
    ends = [interval_around(asked, level, residuals) for level in (0.1, 0.5, 0.9)]
    for (low, high), (lower, higher) in itertools.pairwise(ends):
        assert (lower > 0).all() and (lower < low).all()
        assert (high < higher).all() and (higher < 1).all()


def test_what_cannot_be_said_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which is quicker to refuse
    residuals = residuals_of(*drawn(0, 9, 3))
    asked = torch.tensor([0.5])
    interval_around(asked, 0.9, residuals)
    with pytest.raises(
        ValueError, match=r"expected at most 0.900, the highest level that the 9 .*0.9"
    ):
        interval_around(asked, 0.91, residuals)
    for bad in (0, 1, 1.5, math.nan, True):
        with pytest.raises(
            ValueError, match=r"interval: expected .*more than 0, less than 1, found"
        ):
            interval_around(asked, bad, residuals)
    with pytest.raises(ValueError, match="model has no residuals of validation networks"):
        interval_around(asked, 0.9, {})
    with pytest.raises(ValueError, match="interval: expected of model residuals as a number of"):
        interval_around(asked, 0.9, {"runs": "many"})


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A checkpoint that says how far it was off, and one that does not."""
    folder = tmp_path_factory.mktemp("predictors")
    torch.manual_seed(0)
    model = GeneralizationPredictor(cnn_config("ng_gnn", hidden=4, layers=2))
    found = []
    for name, told in (("told", {"residuals": residuals_of(*drawn(0, 30, 4))}), ("silent", {})):
        found.append(folder / f"{name}.safetensors")
        save_cnn_model(found[-1], model, told)
    return found


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )


def test_a_prediction_comes_with_its_interval_where_one_is_asked_for(paths):
    told, silent = paths
    images = torch.zeros(1, 3, 8, 8)
    plain = predict_accuracy(network(), images, told)
    assert type(plain) is float and plain == predict_accuracy(network(), images, silent)
    found = predict_accuracy(network(), images, told, interval=0.8)
    assert isinstance(found, AccuracyPrediction)
    accuracy, low, high = found
    assert accuracy == plain and all(type(x) is float for x in found)
    model = GeneralizationPredictor.from_checkpoint(told)
    ends = model.interval(torch.tensor([accuracy]), 0.8)
    assert (low, high) == pytest.approx(tuple(e.item() for e in ends), abs=1e-6)
    assert low < accuracy < high
    wider = predict_accuracy(network(), images, told, interval=0.9)
    assert wider.low < low and high < wider.high


def test_a_prediction_beyond_all_accuracies_that_were_seen_comes_with_a_warning(paths, tmp_path):
    model = GeneralizationPredictor.from_checkpoint(paths[1])
    images = torch.zeros(1, 3, 8, 8)
    accuracy = predict_accuracy(network(), images, paths[1])
    for least, most in ((accuracy - 0.1, accuracy + 0.1), (0.0, accuracy - 0.01)):
        save_cnn_model(tmp_path / "m.safetensors", model, {"seen": {"accuracy": [least, most]}})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            predict_accuracy(network(), images, tmp_path / "m.safetensors")
        said = [str(w.message) for w in caught]
        assert len(said) == (most < accuracy)
        assert all(f"accuracy {accuracy:.1%} (seen: 0.0% to {most:.1%})" in w for w in said)


def test_a_checkpoint_without_residuals_gives_no_interval(paths, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    _, silent = paths
    images = torch.zeros(1, 3, 8, 8)
    expected = r"checkpoint '.*silent.safetensors' has no residuals of validation networks"
    with pytest.raises(ValueError, match=expected):
        predict_accuracy(network(), images, silent, interval=0.9)
    with pytest.raises(ValueError, match=r"interval: expected more than 0, less than 1, found 90"):
        predict_accuracy(network(), images, silent, interval=90)
