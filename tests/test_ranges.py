"""Numbers out of their range are refused when they are given, in every configuration alike."""

import dataclasses
import math

import pytest

from l2o_graph.cnn.config import cnn_config
from l2o_graph.cnn.recipe import Recipe as ZooRecipe
from l2o_graph.inr.config import inr_config
from l2o_graph.inr.fit import RECIPES
from l2o_graph.optim.controller import ControllerConfig
from l2o_graph.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE_BELOW_ONE, Range
from l2o_graph.rule import RuleConfig
from meta_train.__main__ import main
from meta_train.cnn_training import CNNTrainingConfig
from meta_train.config import MetaConfig
from meta_train.controller_training import EvolutionConfig
from meta_train.inr_training import INRTrainingConfig

CONFIGURATIONS = [
    ControllerConfig(),
    EvolutionConfig(),
    RuleConfig(),
    MetaConfig(),
    inr_config("ng_gnn"),
    INRTrainingConfig(),
    cnn_config("ng_gnn"),
    CNNTrainingConfig(),
    RECIPES["default"],
    ZooRecipe(10, 2, 1),
]
NUMBERS = [
    (config, field.name)
    for config in CONFIGURATIONS
    for field in dataclasses.fields(config)
    if type(getattr(config, field.name)) in (int, float)
]


def named(config, name):
    return f"{type(config).__name__}.{name}"


@pytest.mark.parametrize(
    ("config", "name"), NUMBERS, ids=[named(config, name) for config, name in NUMBERS]
)
def test_no_number_of_a_configuration_is_negative_or_no_number(config, name):
    whole = type(getattr(config, name)) is int
    for value in [-1] if whole else [-1.0, math.nan, math.inf, -math.inf]:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, found {value}$"):
            dataclasses.replace(config, **{name: value})


SEEDED = [config for config in CONFIGURATIONS if hasattr(config, "seed")]


@pytest.mark.parametrize("config", SEEDED, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("seed", [-1, 1 << 28, 1 << 70, 10**400])
def test_a_seed_is_one_that_all_generators_take(config, seed):
    with pytest.raises(ValueError, match=f"seed: expected from 0 to 268435455, found {seed}"):
        dataclasses.replace(config, seed=seed)
    dataclasses.replace(config, seed=(1 << 28) - 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--preset", "paper", "--clip", "-1"], "clip: expected at least 0, found -1.0"),
        (["--preset", "paper", "--lr", "nan"], "lr: expected a finite number, at least 0, found"),
        (["--lr", "inf"], "lr: expected a finite number, more than 0, found inf"),
        (["--deviation", "inf"], "deviation: expected a finite number, more than 0, found inf"),
        (["--weight-decay", "-0.5"], "weight_decay: expected at least 0, found -0.5"),
        (["--warmup", "-3"], "warmup: expected at least 0, found -3"),
        (["--seed", str(1 << 70)], "seed: expected from 0 to 268435455, found"),
        (["--task", "mnist_inr", "--seed", "-1"], "seed: expected from 0 to 268435455, found -1"),
        (["--task", "mnist_inr", "--clip", "nan"], "clip: expected a finite number, at least 0"),
        (["--task", "cnn_park", "--cooldown", "2"], "cooldown: expected from 0 to 1, found 2.0"),
        (["--threads", str(1 << 40)], "threads: expected from 1 to 4096, found"),
    ],
)
def test_a_command_refuses_them_in_one_line_and_leaves_no_folder(
    options, expected, tmp_path, capsys
):
    assert main([*options, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("meta_train: ") and expected in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("allowed", "right", "wrong", "text"),
    [
        (COUNT, [1, 10**400], [0, -1, 1.0, True, "1", None], "at least 1"),
        (NOT_NEGATIVE, [0, 0.0, 5, 1e308], [-1e-300, math.inf, "1", False], "at least 0"),
        (POSITIVE, [1e-300, 1], [0, 0.0, -0.0, math.nan], "more than 0"),
        (SHARE_BELOW_ONE, [0, 0.999], [1, 1.0, -0.1], "at least 0, less than 1"),
        (Range(0, 1, above=True), [0.5, 1], [0, 1.5], "more than 0, at most 1"),
        (Range(2, 5, whole=True), [2, 5], [1, 6, 2.5], "from 2 to 5"),
    ],
)
def test_what_is_in_a_range(allowed, right, wrong, text):
    assert str(allowed) == text
    for value in right:
        allowed.check("size", value)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^size: expected .*{text}, found {value!r}$"):
            allowed.check("size", value)
