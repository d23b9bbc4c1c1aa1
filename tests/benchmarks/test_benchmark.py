"""The benchmark: a fair comparison, that goes on where it stopped, and says what is wrong."""

import dataclasses
import json
import math

import pytest
import torch
from support.optimizers import controller_file

from meta_train.benchmarks import optimizers as benchmark
from meta_train.benchmarks import report
from meta_train.benchmarks.baselines import contenders
from meta_train.benchmarks.optimizers import compare, execute, main, plan, train
from meta_train.benchmarks.report import markdown
from meta_train.benchmarks.runs import Record, Run, Settings
from meta_train.benchmarks.training import Training
from meta_train.tasks import get_task

TASK = "fmnist_sample"
RUN = Run(TASK, "adam", 1e-3, seed=101, steps=3, device="cpu", checkpoint="")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """In the place of the packaged one."""
    return str(controller_file(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def tiny(checkpoint):
    def make(out, **changes):
        settings = Settings((TASK,), ("adam", "ng"), seeds=1, steps=3, grid={"adam": (1e-3,)})
        return dataclasses.replace(
            settings, out=out, **{"checkpoints": {"ng": checkpoint}, **changes}
        )

    return make


def outcome(records):
    """What a repetition has to reproduce: all but times and dates."""
    return [(r.run, r.accuracy, r.final_loss, r.curve) for r in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint):
    out = tmp_path_factory.mktemp("benchmark")
    optimizers = ["--optimizers", "adam", "muon", "ng", "--grid", "adam=1e-3,1e-2", "muon=0.05"]
    optimizers += ["--checkpoint", f"ng={checkpoint}"]
    counts = ["--seeds", "2", "--steps", "3", "--evaluate-every", "2"]
    assert main(["--tasks", TASK, *optimizers, *counts, "--out", str(out)]) == 0
    return out


def test_writes_every_run_a_table_and_curves(finished):
    records = json.loads((finished / "results.json").read_text())
    runs = {(r["run"]["optimizer"], r["run"]["rate"], r["run"]["seed"]) for r in records}
    rated = [("adam", 1e-3), ("adam", 1e-2), ("muon", 0.05), ("ng", 1.0)]
    assert runs == {(name, rate, seed) for name, rate in rated for seed in (101, 102)}
    for record in records:
        assert record["data"] == "FashionMNIST, the packaged sample"
        assert record["torch"] == torch.__version__
        assert len(record["curve"]) == 1
        assert [step for step, _ in record["accuracies"]] == [2]
        assert 0 < record["update_seconds"] < record["step_seconds"]
        assert record["run"]["checkpoint"].startswith(
            "random0@" if record["run"]["optimizer"] == "ng" else ""
        )
    table = (finished / "results.md").read_text()
    for row in (
        "| Adam | ",
        "| Muon, linear decay | ",
        "| NGOptimizer (learned) | ",
        "| Adam | 0.01",
    ):
        assert row in table
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_of_the_seeds_can_choose_the_rates(tmp_path, tiny):
    grid = {"adam": (1e-3, 1e-2, 0.0)}
    settings = tiny(tmp_path, optimizers=("adam",), grid=grid, seeds=3, tune_seeds=2)
    records = compare(settings)
    seeds = {rate: {r.run.seed for r in records if r.run.rate == rate} for rate in grid["adam"]}
    mean = {
        rate: sum(r.accuracy for r in records if r.run.rate == rate and r.run.seed < 103)
        for rate in grid["adam"]
    }
    chosen = max(mean, key=mean.__getitem__)
    assert seeds == {rate: {101, 102, 103} if rate == chosen else {101, 102} for rate in seeds}
    assert f"| Adam | {chosen:g} (best) |" in markdown(records)


def test_a_rate_with_fewer_seeds_is_never_the_best():
    lucky = made_up("adam", 1e-3, 101, 0.99)
    records = [lucky, *(made_up("adam", 1e-2, 101 + i, 0.8) for i in range(2))]
    assert "| Adam | 80.00 ± 0.00 (0.01) |" in markdown(records)


def test_puts_the_published_figures_beside_ours():
    task = dataclasses.replace(RUN, task="cifar10_cnn")
    adam = dataclasses.replace(made_up("adam", 1e-3, 101, 0.5), run=task)
    muon = dataclasses.replace(adam, run=dataclasses.replace(task, optimizer="muon"))
    table = markdown([adam, muon])
    assert "| optimizer | cifar10_cnn | paper |" in table
    assert "| Adam | 50.00 (0.001) | 54.76 ± 2.82 |" in table
    assert "| Muon, linear decay | 50.00 (0.001) |  |" in table


def test_all_optimizers_start_alike_and_see_the_same_batches(tmp_path, tiny):
    names = ("adam", "adamw", "sgd", "ng", "ng_told", "ng_averaged")
    # At a rate of 0 nothing moves: the losses tell the networks and the batches apart.
    settings = tiny(tmp_path, optimizers=names, grid={n: (0.0,) for n in names}, seeds=2)
    records = execute(settings, plan(settings))
    seen = {(r.run.seed, tuple(r.curve), r.accuracy) for r in records}
    assert len(records) == 12
    assert {seed for seed, *_ in seen} == {101, 102}
    assert len(seen) == 2


def test_the_rate_decays_to_zero_where_it_should():
    problem = get_task(TASK)
    problem.load(None)
    for name, last in (("muon", 0.0125), ("adam", 0.05)):
        network = problem.problem(101, torch.device("cpu"))
        training = Training(network, contenders()[name], 0.05, steps=4)
        rates = []
        for _ in range(4):
            rates.append(training.optimizers[0].param_groups[0]["lr"])
            training.step()
        assert rates[0] == 0.05
        assert rates[-1] == pytest.approx(last)


def test_goes_on_after_an_interruption_with_what_is_missing(
    tmp_path, monkeypatch, capsys, tiny, checkpoint
):
    done = []

    def interrupted(settings, run):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run)
        return train(settings, run)

    arguments = ["--tasks", TASK, "--optimizers", "adam", "ng", "--grid", "adam=1e-3"]
    arguments += ["--checkpoint", f"ng={checkpoint}"]
    arguments += ["--seeds", "2", "--steps", "3", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "train", interrupted)
        assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.md").exists()
    first = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(first) == 2
    later = []
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "train", lambda s, run: later.append(run) or train(s, run))
        assert main(arguments) == 0
    assert len(later) == 2
    assert not set(later) & set(done)
    assert json.loads((tmp_path / "run" / "results.json").read_text())[:2] == first
    settings = tiny(tmp_path / "run", seeds=2)
    whole = tiny(tmp_path / "whole", seeds=2)
    again = outcome(execute(settings, plan(settings)))
    assert again == outcome(execute(whole, plan(whole)))


def test_other_steps_and_other_checkpoints_are_other_runs(tmp_path, tiny):
    settings = tiny(tmp_path)
    other = controller_file(tmp_path, seed=1)
    known = set(plan(settings))
    assert not known & set(plan(dataclasses.replace(settings, steps=2)))
    found = plan(dataclasses.replace(settings, checkpoints={"ng": str(other)}))
    assert [run.optimizer for run in found if run in known] == ["adam"]


def test_a_checkpoint_that_changes_meanwhile_is_noticed(tmp_path, tiny):
    path = tmp_path / "moving.safetensors"
    path.write_bytes(controller_file(tmp_path, 0).read_bytes())
    settings = tiny(tmp_path, optimizers=("ng_told",), checkpoints={"ng": str(path)})
    runs = plan(settings)
    path.write_bytes(controller_file(tmp_path, 1).read_bytes())
    with pytest.raises(RuntimeError, match="changed: expected moving@"):
        execute(settings, runs)


def test_what_is_told_the_end_goes_another_way(tmp_path, tiny):
    settings = tiny(tmp_path, optimizers=("ng", "ng_told", "ng_averaged"), steps=12)
    records = execute(settings, plan(settings))
    curves = {r.run.optimizer: r.curve for r in records}
    assert curves["ng"] == curves["ng_averaged"] != curves["ng_told"]
    table = markdown(records)
    assert "NGOptimizer (learned, told the end)" in table
    assert "NGOptimizer (learned, averaged weights)" in table


def test_accuracies_of_averaged_weights_are_those_and_training_goes_on(checkpoint):
    task = get_task(TASK)
    task.load(None)
    problem = task.problem(101, torch.device("cpu"))
    contender = contenders({"ng": checkpoint})["ng_averaged"]
    training, seen = Training(problem, contender, 1.0, 4), []
    problem.accuracy = lambda parameters: seen.append([p.clone() for p in parameters]) or 0.5
    for _ in range(3):
        training.step()
    weights = [p.detach().clone() for p in problem.module.parameters()]
    assert training.accuracy() == 0.5
    (optimizer,) = training.optimizers
    with optimizer.averaged():
        averages = [p.detach().clone() for p in problem.module.parameters()]
    for p, w, found, a in zip(problem.module.parameters(), weights, seen[0], averages, strict=True):
        assert torch.equal(p, w)
        assert torch.equal(found, a)
    assert not all(torch.equal(a, b) for a, b in zip(weights, seen[0], strict=True))
    training.step()


def test_runs_in_parallel_come_to_the_same(tmp_path, tiny):
    alone, together = tiny(tmp_path / "1"), tiny(tmp_path / "2", jobs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as parallel runs have; more of them add up in another order
    try:
        expected = execute(alone, plan(alone))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(expected, execute(together, plan(together)), strict=True):
        assert one.run == two.run
        assert one.curve == two.curve
        assert one.accuracy == two.accuracy


def test_a_run_that_diverges_says_so(tmp_path, tiny):
    settings = tiny(tmp_path, optimizers=("sgd",), grid={"sgd": (1e30,)}, steps=5)
    (record,) = execute(settings, plan(settings))
    assert record.diverged
    assert record.final_loss is None
    assert all(math.isfinite(loss) for loss in record.curve)
    assert "1 of 1 diverged" in markdown([record])


def made_up(optimizer, rate, seed, accuracy):
    run = dataclasses.replace(RUN, optimizer=optimizer, rate=rate, seed=seed)
    return Record(
        run, accuracy, 0.5, [1.0], [], False, 0.02, 0.001, "data", "torch", "machine", "2026-01-01"
    )


def test_reports_the_rate_with_the_best_mean_over_seeds():
    shares = {1e-3: (0.80, 0.82), 1e-2: (0.90, 0.60)}
    records = [made_up("adam", r, 101 + i, a) for r in shares for i, a in enumerate(shares[r])]
    table = markdown(records)
    assert "| Adam | 81.00 ± 1.41 (0.001) |" in table
    assert "| Adam | 0.001 (best) | 81.00 ± 1.41 | 0.500 ± 0.000 | 20.0 | 1.0 |" in table
    assert "| Adam | 0.01 | 75.00 ± 21.21 |" in table


def test_a_run_without_a_single_loss_is_reported(tmp_path):
    """Its first loss was no number."""
    settings = Settings((TASK,), ("adam", "sgd"), out=tmp_path)
    lost = {"curve": [], "final_loss": None, "diverged": True}
    nothing = dataclasses.replace(made_up("adam", 1e30, 101, 0.1), **lost)
    for records in ([nothing], [nothing, made_up("sgd", 0.1, 101, 0.8)]):
        table, curves = report.report(settings, records)
        assert "| Adam | 10.00, 1 of 1 diverged (1e+30) |" in table.read_text()
        assert curves.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tasks", "nonsense"], "unknown task 'nonsense', expected one of ['cifar10_cnn', "),
        (["--optimizers", "nonsense"], "unknown optimizer 'nonsense', expected one of ['adam', "),
        (["--grid", "nonsense=1"], "unknown optimizer 'nonsense'"),
        (["--grid", "adam=-1"], "rate of adam: expected at least 0, found -1.0"),
        (["--checkpoint", "ng=nonsense"], "unknown checkpoint 'nonsense', expected one of ["),
        (["--seeds", "0"], "seeds: expected at least 1, found 0"),
        (["--checkpoint", "ng_averaged=a"], "expected a name without '_averaged', found 'ng_ave"),
        (
            ["--checkpoint", "mine_told=a"],
            "of each name there are also NAME_told and NAME_averaged",
        ),
        (["--checkpoint", "_told=a"], "expected a name without '_told', found '_told'"),
        (["--checkpoint", "adam=a"], "expected a name beside adam, adamw, sgd, muon, which are op"),
        (["--evaluate-every", "-1"], "evaluate_every: expected at least 0, found -1"),
        (["--grid", "adam=nan"], "rate of adam: expected a finite number, at least 0, found nan"),
        (["--tune-seeds", "-1"], "tune_seeds: expected at least 0, found -1"),
        (["--steps", "0"], "steps: expected at least 1, found 0"),
        (["--device", "nonsense"], "device: cannot use 'nonsense'"),
    ],
)
def test_bad_requests_are_refused_in_one_line_before_anything_is_written(
    arguments, text, tmp_path, capsys
):
    out = tmp_path / "out"
    if "--checkpoint" not in arguments and "--optimizers" not in arguments:
        arguments = [*arguments, "--optimizers", "adam"]  # whether one is packaged or not
    assert main(["--tasks", TASK, "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_grid_that_is_no_grid_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--grid", "adam"])
    assert "expected e.g. adam=1e-3,3e-3, found 'adam'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert main(["--tasks", TASK, "--optimizers", "adam", "--out", str(out)]) == 2
    assert f"out: cannot write to folder '{out}'" in capsys.readouterr().err


def test_data_that_are_absent_are_reported_in_one_line(tmp_path, capsys, monkeypatch):
    def no_network(self):
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", no_network)
    monkeypatch.setattr(get_task("fmnist_cnn"), "_images", None)
    arguments = [
        "--tasks",
        "fmnist_cnn",
        "--optimizers",
        "adam",
        "--data-root",
        str(tmp_path / "none"),
    ]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"dataset 'fmnist' is not in {tmp_path / 'none'}" in error
    assert "--data-root" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["{}", "[1]", '{"a": 1}', "[{", '[{"run": {}}]'])
def test_a_foreign_results_file_is_left_as_it_is(content, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(content)
    arguments = ["--tasks", TASK, "--optimizers", "adam", "--steps", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert "is not a results.json of this benchmark" in capsys.readouterr().err
    assert path.read_text() == content
