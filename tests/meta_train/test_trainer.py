"""The outer loop: it learns, it is repeatable, it survives being killed, it says what is wrong."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.stop import stopped

from l2o_graph import PaperOptimizer
from l2o_graph.optim.checkpoints import load_checkpoint as load_controller
from l2o_graph.optim.controller import ControllerConfig, Reader
from l2o_graph.paper.checkpoints import load_checkpoint
from l2o_graph.paper.rule import Model, RuleConfig, untrained
from meta_train.__main__ import main
from meta_train.config import MetaConfig, paper_recipe
from meta_train.controller_training import EvolutionConfig
from meta_train.run import Result, read_state, write_state
from meta_train.tasks import get_task
from meta_train.trainer import ESTIMATORS, MetaTrainer, meta_train

# A network of 434 parameters on batches of 16: what is tested does not depend on its size.
SMALL = "fmnist_sample:width=4,depth=2,batch=16"
TINY = MetaConfig(
    task=SMALL, rule=RuleConfig(hidden=8, layers=2, inner=4),
    outer_steps=5, unroll=4, evaluate_every=2, evaluate_steps=3, evaluate_seeds=1, save_every=2,
)  # fmt: skip


def missing(reader):
    """Skips what no controller reads yet."""
    return pytest.mark.skipif(reader not in get_args(Reader), reason=f"no reader '{reader}'")


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
    optimizer = PaperOptimizer(module.parameters(), checkpoint=result.checkpoint)
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
def test_every_model_is_meta_trained(model, tmp_path):
    config = paper_recipe(SMALL, model)
    rule = dataclasses.replace(config.rule, hidden=8, layers=1, inner=4)
    config = dataclasses.replace(
        config, rule=rule, outer_steps=1, unroll=4, evaluate_steps=2, evaluate_seeds=1
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


OPTIONS = [
    "--preset", "paper", "--task", "fmnist_sample", "--model", "ff", "--threads", "1", "--unroll",
    "2", "--evaluate-every", "100", "--evaluate-steps", "2", "--evaluate-seeds", "1",
    "--save-every", "1", "--outer-steps", "5",
]  # fmt: skip
COMMAND = [sys.executable, "-W", "ignore", "-m", "meta_train", *OPTIONS]
# The same, which waits for a signal before its fourth step.
HELD = """
import sys
from support import hold
from meta_train.__main__ import main
from meta_train.trainer import MetaTrainer

hold.before(MetaTrainer, "advance", 4)
sys.exit(main())
"""


def outer_step(state):
    """How far a saved state is."""
    return read_state(state)[0]["outer_step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    out, env = tmp_path_factory.mktemp("runs") / "whole", {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*COMMAND, "--out", out], check=True, env=env, capture_output=True)
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_in_the_middle_resumes_to_the_same_weights(tmp_path, number, whole):
    env, broken = {**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path / "broken"
    status, out = stopped(HELD, [*OPTIONS, "--out", broken], number)
    reached = outer_step(broken / "state.safetensors")
    if number == signal.SIGINT:  # the step that it was in is done
        assert (status, reached) == (130, 4)
        assert "--resume" in out
    else:
        assert (status, reached) == (-signal.SIGKILL, 3)

    resumed = [*COMMAND, "--out", broken, "--resume"]
    subprocess.run(resumed, check=True, env=env, capture_output=True)
    expected, found = (load_file(run / "state.safetensors") for run in (whole, broken))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert records(whole / "log.jsonl") == records(broken / "log.jsonl")


def test_the_state_holds_everything(tmp_path):
    get_task(TINY.task).load(None)
    trainer = MetaTrainer(TINY, torch.device("cpu"))
    trainer.advance()
    trainer.save(tmp_path / "state.safetensors")
    again = MetaTrainer.resume(tmp_path / "state.safetensors", torch.device("cpu"))
    for _ in range(4):
        expected, found = trainer.advance(), again.advance()
        assert {**expected, "seconds": 0} == {**found, "seconds": 0}


def test_each_outer_step_has_a_fresh_network(monkeypatch):
    get_task(TINY.task).load(None)
    trainer, seeds = MetaTrainer(TINY, torch.device("cpu")), []
    problem = trainer.task.problem

    def seen(seed, device):
        seeds.append(seed)
        return problem(seed, device)

    monkeypatch.setattr(trainer.task, "problem", seen)
    for _ in range(3):
        trainer.advance()
    assert seeds == [1000, 1001, 1002]


def test_a_loss_that_is_not_finite_does_not_move_the_weights(monkeypatch):
    get_task(TINY.task).load(None)
    trainer = MetaTrainer(TINY, torch.device("cpu"))
    before = [p.clone() for p in trainer.rule.parameters()]
    monkeypatch.setitem(ESTIMATORS, "greedy", lambda rule, problem, steps: [math.nan] * steps)
    assert trainer.advance()["skipped"] == 1
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.rule.parameters(), strict=True))


def test_the_rate_falls_to_zero_as_a_cosine():
    get_task(TINY.task).load(None)
    trainer = MetaTrainer(dataclasses.replace(TINY, outer_steps=4), torch.device("cpu"))
    rates = [trainer.advance()["lr"] for _ in range(4)]
    expected = [3e-4 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx(expected)


def test_the_papers_recipe_runs(tmp_path):
    config = dataclasses.replace(
        paper_recipe(SMALL), outer_steps=1, unroll=2, evaluate_steps=1, evaluate_seeds=1
    )
    result = meta_train(config, tmp_path / "run")
    assert result.checkpoint is not None
    rule = load_checkpoint(result.checkpoint).rule
    assert sum(p.numel() for p in rule.parameters()) == 1_384_322


def test_what_is_wrong_is_said(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"unknown task 'fminst', expected one of .*'fmnist_cnn'"):
        meta_train(dataclasses.replace(TINY, task="fminst"), tmp_path / "run")
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
    assert main(["--preset", "paper", "--threads", "0"]) == 2
    assert "threads: expected from 1 to 4096, found 0" in capsys.readouterr().err

    (tmp_path / "file").write_text("in the way")
    status = main(
        ["--preset", "paper", "--task", "fmnist_sample", "--out", str(tmp_path / "file" / "run")]
    )
    assert status == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_absent_data_is_one_clear_line(tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", offline)
    arguments = ["--preset", "paper", "--data-root", str(tmp_path / "nothing")]
    status = main([*arguments, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert status == 2
    assert f"dataset 'fmnist' is not in {tmp_path / 'nothing'}" in error
    assert "--data-root" in error
    assert "fmnist_sample" in error


# The command line of controllers ----------------------------------------------------------------


def configuration(monkeypatch, *arguments):
    """What is trained by a command."""
    found = []

    def seen(config, out, data_root, resume):
        found.append((config, out, data_root, resume))
        return Result(None, out / "state", out / "log", config.outer_steps, True)

    monkeypatch.setattr("meta_train.__main__.train_controller", seen)
    assert main([*arguments]) == 0
    return found[0]


@pytest.mark.parametrize(
    ("model", "reader", "grain"),
    [
        ("ff", "none", "tensor"),
        ("alone", "none", "neuron"),
        ("ng_gnn", "messages", "neuron"),
        ("ng_t", "attention", "neuron"),
        pytest.param("lstm", "sequence", "neuron", marks=missing("sequence")),
        pytest.param("nfn", "mean", "neuron", marks=missing("mean")),
    ],
)
def test_a_model_is_a_reader_and_a_grain(model, reader, grain, monkeypatch):
    config, out, *_ = configuration(monkeypatch, "--task", "general", "--model", model)
    assert config == EvolutionConfig("general", ControllerConfig(reader, grain))
    assert out == Path("runs") / f"general-{model}-default"


def test_every_number_of_the_configuration_is_an_option(monkeypatch):
    numbers = {
        field.name: field.default
        for field in dataclasses.fields(EvolutionConfig)
        if type(field.default) in (int, float)
    }
    other = {name: value * 2 if value < 0.5 else value + 1 for name, value in numbers.items()}
    other |= {"told": 0.75, "longest": 9000}
    options = [x for k, v in other.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    sizes = ["--channels", "2"]
    config, *rest = configuration(
        monkeypatch, *options, *sizes, "--resume", "--data-root", "a", "--out", "b"
    )
    expected = ControllerConfig("none", channels=2)
    assert config == EvolutionConfig("fmnist_cnn", expected, **other)
    assert rest == [Path("b"), "a", True]


def test_a_controller_is_trained_for_some_families_alone(capsys, tmp_path):
    assert main(["--task", "mnist_cnn", "--out", str(tmp_path / "run")]) == 2
    assert "task: expected one of ['fmnist_cnn', 'general'" in capsys.readouterr().err
    assert main(["--preset", "paper", "--task", "general", "--out", str(tmp_path / "run")]) == 2
    assert "unknown task 'general'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_several_processes_are_for_controllers_alone(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--preset", "paper"]) == 2
    assert "WORLD_SIZE: expected one process" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_one_controller_and_the_first_prints(tmp_path):
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--standalone", "-m", "meta_train", "--task", "general", "--threads", "1",
        "--outer-steps", "2", "--pairs", "16", "--span", "2", "--shortest", "2", "--longest", "4",
        "--evaluate-steps", "2", "--evaluate-pairs", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, env=env, capture_output=True, text=True)
    assert done.stdout.count("best checkpoint: ") == 1
    assert load_controller(tmp_path / "checkpoint.safetensors").provenance["outer_steps"] == 2


@pytest.mark.slow
def test_meta_training_lowers_the_held_out_loss():
    config = MetaConfig(
        task="fmnist_sample", rule=RuleConfig("ff", hidden=8, layers=1, inner=16), outer_steps=40,
        unroll=20, lr=1e-2, evaluate_every=40, evaluate_steps=60,
    )  # fmt: skip
    get_task(config.task).load(None)
    trainer = MetaTrainer(config, torch.device("cpu"))
    before = trainer.evaluate()["held_out_loss"]
    for _ in range(config.outer_steps):
        trainer.advance()
    assert trainer.evaluate()["held_out_loss"] < 0.97 * before
