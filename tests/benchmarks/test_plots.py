"""Plots of predictions; those of standings are tested where they are written."""

from support.pictures import size

from meta_train.benchmarks.plots import plot_predictions


def test_predictors_stand_side_by_side():
    points = [0.1, 0.4, 0.6], [0.2, 0.3, 0.7]
    one, two = plot_predictions({"a": points}), plot_predictions({"a": points, "b": points})
    assert size(two)[0] > 1.8 * size(one)[0]
    assert plot_predictions({"a": (points[0], points[0])}) != one
