"""The outer loop: it learns, it is repeatable, it survives being killed, it says what is wrong."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from typing import get_args

import pytest
import torch
from helpers_stop import stopped
from safetensors import safe_open
from safetensors.torch import load_file

from l2o_graph import NGOptimizer
from l2o_graph.rule import Model, RuleConfig, untrained
from l2o_graph.zoo.registry import load_checkpoint
from meta_train.__main__ import main
from meta_train.config import MetaConfig, default_recipe, paper_recipe
from meta_train.run import write_state
from meta_train.tasks import get_task
from meta_train.trainer import MetaTrainer, meta_train

TINY = MetaConfig(
    task="fmnist_sample", rule=RuleConfig(hidden=8, layers=2, inner=4),
    outer_steps=5, unroll=4, snapshots=2, trajectories=2, shortest=4, longest=12, warmup=1,
    evaluate_every=2, evaluate_steps=3, evaluate_seeds=1, save_every=2,
)  # fmt: skip


def records(log):
    """What was logged, but for how long it took."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_a_run_leaves_a_checkpoint_that_trains_networks(tmp_path):
    result = meta_train(TINY, tmp_path / "run")
    assert result.finished
    assert result.checkpoint is not None
    provenance = load_checkpoint(result.checkpoint).provenance
    assert provenance["config"]["outer_steps"] == 5
    assert provenance["data"] == "FashionMNIST, the packaged sample"
    module = torch.nn.Linear(3, 2)
    optimizer = NGOptimizer(module.parameters(), checkpoint=result.checkpoint)
    before = module.weight.detach().clone()
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, module.weight)
    steps = [r["outer_step"] for r in records(result.log) if "loss" in r]
    evaluated = [r["outer_step"] for r in records(result.log) if "held_out_loss" in r]
    assert steps == [1, 2, 3, 4, 5]
    assert evaluated == [0, 2, 4, 5]


def test_without_outer_steps_the_checkpoint_is_the_untrained_rule(tmp_path):
    config = dataclasses.replace(TINY, outer_steps=0)
    result = meta_train(config, tmp_path / "run")
    assert result.finished
    assert result.checkpoint is not None
    expected = untrained(config.rule, config.seed).state_dict()
    found = load_checkpoint(result.checkpoint).rule.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("model", get_args(Model))
@pytest.mark.parametrize("recipe", [default_recipe, paper_recipe])
def test_every_model_is_meta_trained_by_both_recipes(model, recipe, tmp_path):
    config = recipe("fmnist_sample", model)
    short = {key: getattr(TINY, key) for key in ("unroll", "snapshots", "shortest", "longest")}
    rule = dataclasses.replace(config.rule, hidden=8, layers=1, inner=4)
    config = dataclasses.replace(
        config, rule=rule, outer_steps=1, evaluate_steps=2, evaluate_seeds=1, **short
    )
    result = meta_train(config, tmp_path / "run")
    assert result.checkpoint is not None
    learned = load_checkpoint(result.checkpoint).rule
    assert learned.config.model == model
    before = untrained(config.rule, config.seed)
    pairs = zip(learned.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    logs = [
        records(meta_train(dataclasses.replace(TINY, seed=seed), tmp_path / name).log)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


COMMAND = [
    sys.executable, "-W", "ignore", "-m", "meta_train", "--task", "fmnist_sample", "--threads", "1",
    "--unroll", "4", "--snapshots", "2", "--trajectories", "2", "--shortest", "4",
    "--longest", "12", "--evaluate-every", "100", "--evaluate-steps", "2",
    "--evaluate-seeds", "1", "--save-every", "1", "--outer-steps", "8",
]  # fmt: skip


def outer_step(state):
    """How far a saved state is; -1 before the first."""
    if not state.exists():
        return -1
    content = state.read_bytes()  # opened once: the run may put a new file there at any time
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["record"])["outer_step"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_in_the_middle_resumes_to_the_same_weights(tmp_path, number):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*COMMAND, "--out", whole], check=True, env=env, capture_output=True)

    def ready():
        return outer_step(broken / "state.safetensors") >= 2

    status, out = stopped([*COMMAND, "--out", broken], ready, number)
    reached = outer_step(broken / "state.safetensors")
    assert 2 <= reached < 8
    assert status == (130 if number == signal.SIGINT else -signal.SIGKILL)
    if number == signal.SIGINT:
        assert "--resume" in out

    resumed = [*COMMAND, "--out", broken, "--resume"]
    subprocess.run(resumed, check=True, env=env, capture_output=True)
    expected, found = (load_file(run / "state.safetensors") for run in (whole, broken))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert records(whole / "log.jsonl") == records(broken / "log.jsonl")


def test_the_state_holds_everything(tmp_path):
    task = MetaTrainer(TINY, torch.device("cpu")).task
    task.load(None)
    trainer = MetaTrainer(TINY, torch.device("cpu")).begin()
    trainer.advance()
    trainer.save(tmp_path / "state.safetensors")
    again = MetaTrainer.resume(tmp_path / "state.safetensors", torch.device("cpu"))
    for _ in range(4):
        expected, found = trainer.advance(), again.advance()
        assert {**expected, "seconds": 0} == {**found, "seconds": 0}


def test_a_diverged_segment_neither_moves_the_weights_nor_goes_on(tmp_path):
    task = MetaTrainer(TINY, torch.device("cpu")).task
    task.load(None)
    trainer = MetaTrainer(TINY, torch.device("cpu")).begin()
    lost = trainer.trajectories[0]
    lost.parameters = [p * float("nan") for p in lost.parameters]
    before = [p.clone() for p in trainer.rule.parameters()]
    record = trainer.advance()
    assert record["skipped"] == 1
    assert trainer.trajectories[0] is not lost
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.rule.parameters(), strict=True))


def test_the_papers_recipe_runs(tmp_path):
    config = dataclasses.replace(
        paper_recipe("fmnist_sample"), outer_steps=1, unroll=2, shortest=2, longest=2, snapshots=1,
        evaluate_steps=1, evaluate_seeds=1,
    )  # fmt: skip
    result = meta_train(config, tmp_path / "run")
    assert result.checkpoint is not None
    rule = load_checkpoint(result.checkpoint).rule
    assert sum(p.numel() for p in rule.parameters()) == 1_384_322


def test_what_is_wrong_is_said(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"unknown task 'fminst', expected one of .*'fmnist_cnn'"):
        meta_train(dataclasses.replace(TINY, task="fminst"), tmp_path / "run")
    with pytest.raises(ValueError, match="snapshots: expected at most unroll = 4, found 5"):
        dataclasses.replace(TINY, snapshots=5)
    with pytest.raises(ValueError, match=r"pairs: expected 0 under 'paper'.* found 1"):
        dataclasses.replace(paper_recipe(), pairs=1)
    with pytest.raises(ValueError, match="unroll: expected at least 1, found 0"):
        dataclasses.replace(TINY, unroll=0)

    meta_train(TINY, tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds a run already; resume it"):
        meta_train(TINY, tmp_path / "run")
    with pytest.raises(ValueError, match="another configuration: unroll is 4, not 6"):
        meta_train(dataclasses.replace(TINY, unroll=6), tmp_path / "run", resume=True)

    state = tmp_path / "run" / "state.safetensors"
    with safe_open(state, framework="pt") as file:
        record = json.loads(file.metadata()["record"])
    record["config"]["swing"] = record["config"].pop("unroll")
    write_state(state, record, {})
    with pytest.raises(ValueError, match="swing is 4, not None, unroll is None, not 4"):
        meta_train(TINY, tmp_path / "run", resume=True)
    state.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="expected the state of a run, found: Safetensor"):
        meta_train(TINY, tmp_path / "run", resume=True)
    assert main(["--threads", "0"]) == 2
    assert "threads: expected at least 1, found 0" in capsys.readouterr().err

    (tmp_path / "file").write_text("in the way")
    status = main(["--task", "fmnist_sample", "--out", str(tmp_path / "file" / "run")])
    assert status == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_absent_data_is_one_clear_line(tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", offline)
    status = main(["--data-root", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert status == 2
    assert f"dataset 'fmnist' is not in {tmp_path / 'nothing'}" in error
    assert "--data-root" in error
    assert "fmnist_sample" in error


def test_pairs_move_the_lengths_and_segments_the_rest(tmp_path):
    for pairs, unroll_rate, length_rate in ((1, 0.0, 1e-2), (0, 1e-2, 1e-2)):
        config = dataclasses.replace(
            TINY, pairs=pairs, lr=unroll_rate, length_lr=length_rate, outer_steps=2
        )
        get_task(config.task).load(None)
        trainer = MetaTrainer(config, torch.device("cpu")).begin()
        before = [p.clone() for p in (*trainer.rule.of_direction(), *trainer.rule.of_length())]
        trainer.advance()
        trainer.advance()
        after = [*trainer.rule.of_direction(), *trainer.rule.of_length()]
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        directions = len(trainer.rule.of_direction())
        assert any(moved[:directions]) == (unroll_rate > 0)
        assert all(moved[directions:]) == any(moved[directions:]) == (pairs > 0)


@pytest.mark.slow
def test_meta_training_lowers_the_held_out_loss(tmp_path):
    """From a rule whose steps are far too short."""
    config = MetaConfig(
        task="fmnist_sample", rule=RuleConfig(hidden=8, layers=1, inner=4), outer_steps=40,
        length_lr=0.1, warmup=1, shortest=60, longest=60, unroll=4, snapshots=2,
        evaluate_every=40, evaluate_steps=60,
    )  # fmt: skip
    get_task(config.task).load(None)
    trainer = MetaTrainer(config, torch.device("cpu"))
    with torch.no_grad():
        trainer.rule.length.bias.fill_(-2.0)
    trainer.begin()
    before = trainer.evaluate()["held_out_loss"]
    for _ in range(config.outer_steps):
        trainer.advance()
    assert trainer.evaluate()["held_out_loss"] < 0.97 * before
