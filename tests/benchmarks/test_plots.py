"""Plots: what is drawn where."""

from dataclasses import replace

from support.pictures import size

from meta_train.benchmarks.plots import Curve, Panel, plot_curves, plot_predictions

LOSSES = [[2.0, 1.0, 0.5], [2.2, 1.1, 0.6]]


def test_accuracies_take_a_second_row_where_there_are_any():
    curve = Curve("adam", "Adam", LOSSES, every=10)
    losses = plot_curves([Panel("one", [curve])])
    tested = replace(curve, accuracies=[[(10, 0.5), (30, 0.8)], [(10, 0.4), (30, 0.7)]])
    both = plot_curves([Panel("one", [tested, curve])])
    assert size(losses)[0] == size(both)[0]
    assert size(losses)[1] < size(both)[1]
    assert plot_curves([Panel("one", [replace(tested, accuracies=[[(30, 0.8)]])])]) != both


def test_panels_stand_side_by_side_and_seeds_may_end_early():
    panel = Panel("one", [Curve("adam", "Adam", [[2.0, 1.0], [2.0]])])
    assert size(plot_curves([panel, panel]))[0] > 1.8 * size(plot_curves([panel]))[0]


def test_predictors_stand_side_by_side():
    points = [0.1, 0.4, 0.6], [0.2, 0.3, 0.7]
    one, two = plot_predictions({"a": points}), plot_predictions({"a": points, "b": points})
    assert size(two)[0] > 1.8 * size(one)[0]
    assert plot_predictions({"a": (points[0], points[0])}) != one
