"""Plots of models that read networks; those of standings are tested where they are written."""

import pytest
from support.pictures import size

from meta_train.benchmarks.plots import plot_predictions, plot_training
from meta_train.benchmarks.rows import accuracies


def test_predictors_stand_side_by_side():
    points = [0.1, 0.4, 0.6], [0.2, 0.3, 0.7]
    one, two = plot_predictions({"a": points}), plot_predictions({"a": points, "b": points})
    assert size(two)[0] > 1.8 * size(one)[0]
    assert plot_predictions({"a": (points[0], points[0])}) != one


def test_lines_of_training_are_drawn_for_each_model():
    line = [(0.1, 0.1), (0.5, 0.3), (0.9, 0.4)]
    one, two = plot_training({"a": line}), plot_training({"a": line, "b": line[:2]})
    assert size(one) == size(two)
    assert len({one, two, plot_training({"a": line[:2]})}) == 3


def test_accuracies_on_what_is_trained_on_are_of_the_steps_since_the_last_evaluation(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 0, "val_accuracy": 0.1}\n'
        '{"step": 1, "accuracy": 0.25}\n{"step": 2, "accuracy": 0.75}\n'
        '{"step": 2, "val_accuracy": 0.4}\n{"step": 3, "accuracy": 1.0}\n'
        '{"step": 3, "val_accuracy": 0.6}\n'
        '{"step": 3, "val_accuracy": 0.6, "test_accuracy": 0.5}\n'
    )
    assert accuracies(log) == [(0.5, 0.4), (1.0, 0.6)]


@pytest.mark.parametrize("content", ["", "{}\n", '{"step": 1, "loss": 0.1}\n', "\xff\n"])
def test_a_log_without_accuracies_is_named(tmp_path, content):
    log = tmp_path / "log.jsonl"
    log.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"^'{log}': expected accuracies of steps"):
        accuracies(log)
