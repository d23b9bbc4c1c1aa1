"""The benchmark of optimizers: fair runs, plain rules, nothing done twice."""

import contextlib
import json
import math
import warnings
from dataclasses import replace
from importlib.util import find_spec
from typing import ClassVar

import pytest
import torch
from support.optimizers import controller_file

from meta_train.benchmarks import contenders, records, training
from meta_train.benchmarks.judge import (
    Entry,
    at_best_rates,
    clearly_worse,
    failed,
    gain,
    over_seeds,
    over_tasks,
    standings,
    summary,
)
from meta_train.benchmarks.optimizers import (
    Settings,
    compare,
    execute,
    main,
    plan,
    with_averages,
)
from meta_train.benchmarks.records import Record, Run
from meta_train.benchmarks.report import Outcome, markdown, stopped_early, write
from meta_train.benchmarks.strangers import tasks, taught
from meta_train.benchmarks.strangers.task import ACCURACY, Merit, linear_decay
from meta_train.benchmarks.strangers.tasks import TASKS
from meta_train.tasks import get_task

LOSS = Merit("nats")
needs_library = pytest.mark.skipif(
    find_spec(contenders.LIBRARY) is None, reason=f"needs {contenders.LIBRARY}"
)
TINY = Settings(tasks=("flow", "value"), data_root="sample", steps=8)


@pytest.fixture(autouse=True)
def _little_pretraining(monkeypatch):
    monkeypatch.setattr(taught, "PRETRAINING", 3)
    taught.pretrained.cache_clear()
    yield
    taught.pretrained.cache_clear()


class StandIn(torch.optim.AdamW):
    """Has what the learned optimizer has."""

    made: ClassVar[list] = []

    @contextlib.contextmanager
    def averaged(self):
        params = [p for group in self.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.zero_()
            yield
            for p, k in zip(params, kept, strict=True):
                p.copy_(k)


@pytest.fixture
def stand_in(monkeypatch):
    StandIn.made = []

    def made(net, checkpoint, rate, total_steps=None):
        StandIn.made.append(total_steps)
        return StandIn(net.parameters())

    monkeypatch.setattr(contenders, "ng_optimizer", made)
    for module in (contenders, training):
        monkeypatch.setattr(module, "identity", lambda checkpoint: "12ab")


# --- tasks -------------------------------------------------------------------------------------


def equal(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_same_for_all_and_can_be_trained(name):
    task = TASKS[name]
    if task.library:
        pytest.importorskip(task.library)
    first, again, other = (task.make(seed, "sample") for seed in (1, 1, 2))
    starts = [list(problem.net.state_dict().values()) for problem in (first, again, other)]
    assert equal(starts[0], starts[1])
    assert equal(first.batch(3), again.batch(3))
    assert equal(first.batch(3), first.batch(3))
    # What starts from a trained network differs by its batches alone.
    assert not equal(first.batch(3), other.batch(3)) or not equal(starts[0], starts[2])
    optimizer = torch.optim.AdamW(first.net.parameters())
    before = [p.detach().clone() for p in first.net.parameters()]
    state = torch.random.get_rng_state()
    for step in range(2):
        optimizer.zero_grad()
        loss = first.loss(first.net, first.batch(step))
        assert math.isfinite(loss.item())
        loss.backward()
        optimizer.step()
    merit = first.merit()
    assert torch.equal(state, torch.random.get_rng_state())
    assert math.isfinite(merit) and merit >= 0
    assert task.merit.higher or merit > 0
    assert first.net.training
    moved = [not torch.equal(p, b) for p, b in zip(first.net.parameters(), before, strict=True)]
    assert all(moved)


def test_there_are_enough_kinds():
    assert len(TASKS) >= 14
    assert set(tasks.QUICK) <= set(TASKS)


# --- names -------------------------------------------------------------------------------------


def test_unknown_names_are_told_with_the_known_ones(capsys, tmp_path):
    out = ["--out", str(tmp_path)]
    assert main(["--tasks", "chess", *out]) == 2
    error = capsys.readouterr().err
    assert "unknown task 'chess'" in error and "vit" in error and "fmnist_cnn" in error
    for given in (["--optimizers", "lion"], ["--grid", "lion=1"]):
        assert main(["--tasks", "flow", *given, *out]) == 2
        error = capsys.readouterr().err
        assert "unknown optimizer 'lion'" in error and "adamw-default" in error


@pytest.mark.parametrize(
    "wrong", [{"seeds": 0}, {"jobs": 0}, {"steps": -1}, {"device": "nonsense"}]
)
def test_impossible_settings_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        compare(replace(TINY, out=tmp_path, **wrong))


def test_what_needs_a_missing_package_is_left_out_with_a_line(monkeypatch):
    for module in (tasks, contenders):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    found, lines = tasks.choose_tasks(("digits", "flow", "digits"))
    assert [task.name for task in found] == ["flow"]
    assert lines == ["task digits left out: needs sklearn"]
    known, lines = contenders.choose_contenders(("adamw", "soap"), "general")
    assert list(known) == ["adamw"]
    assert lines == ["optimizer soap left out: needs pytorch_optimizer"]


def test_a_checkpoint_that_is_not_there_leaves_the_learned_ones_out():
    known, lines = contenders.choose_contenders(("muon", "ng"), "no-such-checkpoint")
    assert list(known) == ["muon"]
    assert "optimizer ng left out" in lines[0] and "no-such-checkpoint" in lines[0]


# --- contenders --------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("name", ["soap", "schedule-free", "prodigy"])
def test_rivals_of_a_library_train(name):
    rate = contenders.contenders()[name].rates[0]
    record = training.train(Run("flow", name, rate, 1, 8), root="sample")
    assert not record.diverged and record.merit is not None
    assert sorted(record.merits) == ([8] if name == "soap" else [1, 2, 4, 8])


def test_the_rate_falls_to_zero_where_it_should():
    problem = TASKS["flow"].make(1, "sample")
    [optimizer] = contenders.contenders()["adamw"].make(problem.net, 0.1, 4)
    decay = linear_decay(optimizer, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        decay.step()
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_batchnorm_sees_batches_again_for_swapped_weights_and_is_as_before():
    problem = TASKS["resnet"].make(1, "sample")
    before = {k: v.clone() for k, v in problem.net.state_dict().items()}
    with training.new_norm_statistics(problem):
        assert not torch.equal(problem.net.norm.running_var, before["norm.running_var"])
        assert problem.net.norm.num_batches_tracked == training.NORM_BATCHES
    after = problem.net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert problem.net.norm.momentum == 0.1


# --- the learned ones --------------------------------------------------------------------------


def test_one_run_gives_last_and_averaged_weights_and_the_told_one_knows_its_end(stand_in, tmp_path):
    settings = replace(TINY, tasks=("value",), optimizers=("ng", "ng-averaged", "ng-told"))
    outcome = compare(replace(settings, out=tmp_path))
    by_name = {record.run.optimizer: record for record in outcome.records}
    assert len((tmp_path / records.FILE).read_text().splitlines()) == 2
    assert by_name["ng"].merit != by_name["ng-averaged"].merit
    assert all(r.run.checkpoint == "12ab" for r in outcome.records)
    assert 8 in StandIn.made  # the length of the run
    averaged_alone = compare(replace(settings, optimizers=("ng-averaged",), out=tmp_path))
    assert [r.merit for r in averaged_alone.records] == [by_name["ng-averaged"].merit]


def test_the_real_one_is_called_as_its_users_do(tmp_path):
    file = str(controller_file(tmp_path))
    names = ("ng", "ng-averaged", "ng-told")
    known, lines = contenders.choose_contenders(names, file)
    assert list(known) == list(names) and not lines
    run = Run("resnet", "ng", 1.0, 1, 4, contenders.identity(file))
    record = training.train(run, file, "sample")
    assert sorted(record.merits) == sorted(record.averaged) == [1, 2, 4]
    assert not record.diverged and record.averaged[4] is not None
    told = training.train(replace(run, optimizer="ng-told"), file, "sample")
    assert sorted(told.merits) == [4] and told.curve != record.curve


def test_a_changed_checkpoint_stops_a_run(stand_in):
    with pytest.raises(RuntimeError, match="changed"):
        training.train(Run("value", "ng", 1.0, 1, 2, "00ff"), root="sample")


# --- rules -------------------------------------------------------------------------------------


def entry(name, *merits, rate=1.0, start=10.0, is_learned=False, diverged=False):
    seeds = range(1, 1 + len(merits))
    return Entry(
        name, rate, dict(zip(seeds, merits, strict=True)), dict.fromkeys(seeds, start), diverged,
        is_learned,
    )  # fmt: skip


def test_gains_are_in_units_of_what_counts_as_level():
    assert gain(ACCURACY, 80.6, 80.0) == pytest.approx(2)
    assert gain(LOSS, 1.0, 1.02) == pytest.approx(1)
    assert gain(LOSS, 1.02, 1.0) == pytest.approx(-1)
    assert gain(LOSS, None, 1.0) == -gain(LOSS, 1.0, None) < -100
    assert gain(LOSS, None, None) == 0


def test_clearly_worse_is_two_points_or_a_tenth():
    assert clearly_worse(ACCURACY, 77.9, 80.0) and not clearly_worse(ACCURACY, 78.1, 80.0)
    assert clearly_worse(LOSS, 1.11, 1.0) and not clearly_worse(LOSS, 1.09, 1.0)
    assert clearly_worse(LOSS, None, 1.0) and not clearly_worse(LOSS, 1.0, None)


def test_failed_is_diverged_or_no_better_than_before_training():
    assert failed(ACCURACY, entry("a", 11.0, start=10.0))
    assert not failed(ACCURACY, entry("a", 13.0, start=10.0))
    assert failed(LOSS, entry("a", 0.95, start=1.0))
    assert not failed(LOSS, entry("a", 0.5, start=1.0))
    assert failed(LOSS, entry("a", 0.5, None, start=1.0))
    assert failed(LOSS, entry("a", 0.5, start=1.0, diverged=True))


def test_the_best_rate_is_that_of_the_best_mean_among_those_with_most_seeds():
    entries = [
        entry("a", 1.0, 3.0, rate=0.1), entry("a", 1.5, 1.5, rate=0.2), entry("a", 0.1, rate=0.3),
        entry("a", 0.2, None, rate=0.4),
    ]  # fmt: skip
    assert at_best_rates(LOSS, entries)["a"].rate == 0.2


def test_ranks_count_rivals_alone():
    entries = [
        entry("adamw", 80.0, rate=0.1), entry("adamw", 79.0, rate=0.2),
        entry("adamw-default", 70.0), entry("muon", 81.0),
        entry("ng", 79.9, is_learned=True), entry("ng-told", 80.9, is_learned=True),
        entry("lost", 71.0, start=70.0, is_learned=True),
    ]  # fmt: skip
    found = standings(ACCURACY, entries)
    ranks = {name: (s.rank, s.rank_of_all) for name, s in found.items()}
    assert ranks == {
        "adamw": (2, 2), "adamw-default": (3, 4), "muon": (1, 1),
        "ng": (3, 3), "ng-told": (2, 2), "lost": (3, 4),
    }  # fmt: skip
    assert [name for name, s in found.items() if s.level] == ["muon", "ng-told"]
    assert [name for name, s in found.items() if s.failed] == ["lost"]
    assert found["ng-told"].behind == pytest.approx(1 / 3)
    assert found["muon"].behind == pytest.approx(-1 / 0.3)
    assert not any(s.worse_than_default for s in found.values())


def test_a_summary_counts_over_tasks():
    entries = [entry("adamw-default", 1.0), entry("muon", 0.9), entry("ng", 0.8, is_learned=True)]
    worse = [entry("adamw-default", 1.0), entry("muon", 0.9), entry("ng", 1.2, is_learned=True)]
    tables = [standings(LOSS, each) for each in (entries, worse)]
    # Two tasks, both median ranks; first, level, failed, worse.
    assert summary([table["ng"] for table in tables]) == (2, 2.0, 2.0, 1, 1, 0, 1)
    assert summary([table["muon"] for table in tables])[3] == 2


def test_over_tasks_is_wilcoxon():
    # All of one sign, n = 8: two of the 256 signs are as extreme.
    sure = over_tasks([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert sure.p == pytest.approx(2 / 256)
    assert (sure.wins, sure.count, sure.better, sure.gain) == (8, 8, "yes", 4.5)
    assert over_tasks([-g for g in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)]).better == "no"
    mixed = over_tasks([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0])
    assert mixed.better == "not significant" and mixed.p > 0.5
    few = over_tasks([1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert few.p is None and few.better == "not significant"


def test_over_seeds_is_a_paired_t_test_and_asks_for_a_unit():
    # Mean 2, deviation 1, n = 4: t = 4 with three degrees of freedom.
    found = over_seeds([1.0, 3.0, 1.0, 3.0])
    t = 2 / math.sqrt((4 / 3) / 4)
    from scipy.stats import t as student

    assert found.p == pytest.approx(2 * student.sf(t, 3))
    assert found.better == "yes"
    assert over_seeds([0.4, 0.5, 0.6, 0.5]).better == "not significant"  # sure, but small
    assert over_seeds([9.0, 9.0]).p is None
    assert over_seeds([2.0, 2.0, 2.0]).better == "yes"
    assert over_seeds([0.0, 0.0, 0.0]).p == 1.0


# --- runs --------------------------------------------------------------------------------------


def test_only_what_is_missing_is_run(tmp_path, monkeypatch):
    settings = replace(TINY, optimizers=("adamw-default",), out=tmp_path)
    compare(settings)
    lines = (tmp_path / records.FILE).read_text()
    assert len(lines.splitlines()) == 2
    done = []
    real = training.train
    monkeypatch.setattr(
        "meta_train.benchmarks.optimizers.train",
        lambda run, **rest: (done.append(run), real(run, **rest))[1],
    )
    compare(settings)
    assert not done and (tmp_path / records.FILE).read_text() == lines
    compare(replace(settings, seeds=2))
    assert [(run.task, run.seed) for run in done] == [("flow", 2), ("value", 2)]


def test_what_is_finished_can_be_reported_before_the_end(tmp_path):
    settings = replace(TINY, optimizers=("adamw-default",), out=tmp_path)
    with pytest.raises(ValueError, match="no run of these is finished"):
        compare(replace(settings, finished=True))
    compare(replace(settings, tasks=("flow",)))
    more = replace(settings, optimizers=("adamw-default", "muon"), finished=True)
    outcome = compare(more)
    assert [task.name for task in outcome.tasks] == ["flow"]
    assert [r.run.optimizer for r in outcome.records] == ["adamw-default"]
    assert len(write(outcome, tmp_path)) == 3


def test_a_line_cut_off_is_run_again_and_a_strange_file_is_refused(tmp_path):
    settings = replace(TINY, optimizers=("adamw-default",), out=tmp_path)
    compare(settings)
    path = tmp_path / records.FILE
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert len(records.read(tmp_path)) == 1
    assert len(compare(settings).records) == 2
    assert len(records.read(tmp_path)) == 2
    for strange in ("{}", "task,merit", '{"run": {}}'):
        path.write_text(whole + strange + "\n")
        with pytest.raises(ValueError, match="not a run"):
            records.read(tmp_path)


def test_runs_repeat_to_the_bit():
    one, two = (training.train(Run("flow", "muon", 0.02, 1, 6), root="sample") for _ in range(2))
    assert (one.merits, one.curve, one.start) == (two.merits, two.curve, two.start)


def test_a_run_that_diverges_has_no_figure():
    record = training.train(Run("flow", "adamw", 1e30, 1, 6), root="sample")
    assert record.diverged and record.merit is None
    assert json.loads(json.dumps(record.merits, allow_nan=False)) == {"6": None}


def test_what_knows_no_end_is_run_once_for_all_stops(tmp_path):
    settings = replace(TINY, tasks=("flow",), anytime=True, out=tmp_path)
    wanted, _ = tasks.choose_tasks(settings.tasks)
    known = {n: contenders.contenders()[n] for n in ("adamw-default", "adamw")}
    known["adamw"] = replace(known["adamw"], rates=(1e-3,))
    wanted = [replace(task, steps=8) for task in wanted]
    runs = plan(settings, wanted, known)
    steps = {n: [run.steps for run in runs if run.optimizer == n] for n in known}
    assert steps == {"adamw-default": [8], "adamw": [1, 2, 4, 8]}
    stopped = stopped_early(wanted, execute(settings, runs))
    assert list(stopped) == [0.125, 0.25, 0.5, 1.0]
    for share, found in stopped.items():
        assert {r.run.optimizer for r in found} == set(known)
        assert all(r.run.steps == 8 * share and r.merit is not None for r in found)


# --- tasks of meta_train.tasks -----------------------------------------------------------------

PAPERS = Settings(tasks=("fmnist_sample:width=4",), steps=3)


def test_a_registered_task_is_trained_at_the_papers_seeds(tmp_path):
    names = ("adam", "adamw", "sgd", "ng_averaged")
    # At a rate of 0 nothing moves: the losses tell the networks and the batches apart.
    grid = {name: (0.0,) for name in names[:3]}
    settings = replace(PAPERS, optimizers=names, grid=grid, seeds=2, out=tmp_path)
    outcome = compare(replace(settings, checkpoint=str(controller_file(tmp_path))))
    assert {r.run.optimizer for r in outcome.records} == {*names[:3], "ng-averaged"}
    still = {(r.run.seed, *r.curve, r.merit) for r in outcome.records if r.run.rate == 0}
    assert len(still) == 2
    problem = tasks.find("fmnist_sample:width=4").make(1, None)
    expected = get_task("fmnist_sample:width=4").problem(101, torch.device("cpu"))
    starts = zip(problem.net.parameters(), expected.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in starts)
    assert equal(problem.batch(2), expected.batch(2))
    accuracy = expected.accuracy(list(expected.module.parameters()))
    assert problem.evaluate(problem.net) == pytest.approx(100 * accuracy)


@pytest.mark.parametrize("name", ["fmnist_cnn:width=4", "mnist_cnn:width=4", "cifar10_cnn:width=4"])
def test_a_registered_task_can_be_trained_on_the_sample(name, tmp_path):
    settings = replace(PAPERS, tasks=(name,), optimizers=("adamw-default",), data_root="sample")
    (record,) = compare(replace(settings, steps=2, out=tmp_path)).records
    assert record.merit is not None
    channels, size = (3, 32) if "cifar" in name else (1, 28)
    assert tasks.find(name).make(1, "sample").batch(0)[0].shape == (128, channels, size, size)


def test_tasks_of_strangers_are_for_the_cpu():
    found, lines = tasks.choose_tasks(("flow", "fmnist_sample"), None, "cuda")
    assert [task.name for task in found] == ["fmnist_sample"]
    assert lines == ["task flow left out: needs the CPU"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--grid", "adam=-1"], "rate of adam: expected at least 0, found -1.0"),
        (["--grid", "adam=nan"], "rate of adam: expected a finite number, at least 0, found nan"),
        (["--optimizers", "ng", "--checkpoint", "none"], "unknown checkpoint 'none', expected"),
        (["--tasks", "fmnist_sample:colour=1"], "expected one of ['batch', 'width'"),
    ],
)
def test_bad_requests_are_refused_in_one_line_before_anything_is_written(
    arguments, text, tmp_path, capsys
):
    out = tmp_path / "out"
    given = ["--tasks", "fmnist_sample", "--optimizers", "adam", *arguments]
    assert main([*given, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not out.exists()


def test_a_grid_that_is_no_grid_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--grid", "adam"])
    assert "expected e.g. adam=1e-3,3e-3, found 'adam'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert main(["--tasks", "fmnist_sample", "--optimizers", "adam", "--out", str(out)]) == 2
    assert f"out: cannot write to folder '{out}'" in capsys.readouterr().err


def test_data_that_are_absent_are_reported_in_one_line(tmp_path, capsys, monkeypatch):
    def no_network(self):
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", no_network)
    given = ["--tasks", "fmnist_cnn", "--optimizers", "adam", "--data-root", str(tmp_path / "none")]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"dataset 'fmnist' is not in {tmp_path / 'none'}" in error
    assert "--data-root" in error and error.count("\n") == 1


def test_runs_in_parallel_come_to_the_same(tmp_path):
    settings = replace(PAPERS, optimizers=("adamw-default", "muon"), grid={"muon": (0.02,)})
    alone, together = (
        compare(replace(settings, out=tmp_path / str(jobs), jobs=jobs)).records for jobs in (1, 2)
    )
    for one, two in zip(alone, together, strict=True):
        assert (one.run, one.curve, one.merits) == (two.run, two.curve, two.merits)


def test_an_interrupted_command_goes_on(tmp_path, monkeypatch, capsys):
    def interrupted(run, **rest):
        raise KeyboardInterrupt

    given = ["--tasks", "fmnist_sample:width=4", "--optimizers", "adamw-default", "--steps", "2"]
    given += ["--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("meta_train.benchmarks.optimizers.train", interrupted)
        assert main(given) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert main(given) == 0 and (tmp_path / "results.md").exists()


# --- what is written ---------------------------------------------------------------------------


def made_up(task, name, rate, seed, merit, is_diverged=False):
    return Record(
        Run(task, name, rate, seed, 100), 10.0, {100: merit}, {}, [3.0, 2.0, 1.0], is_diverged,
        0.01, 0.002, 0.003, 1.0, "2", "2026-01-01",
    )  # fmt: skip


@pytest.fixture
def outcome():
    wanted = [replace(TASKS[name], steps=100) for name in ("vit", "gpt")]
    known = {n: contenders.contenders()[n] for n in ("adamw", "adamw-default", "muon", "ng")}
    done = [
        made_up(task, name, rate, seed, merit + seed)
        for seed in (1, 2, 3)
        for task in ("vit", "gpt")
        for name, rate, merit in (
            ("adamw", 1e-3, 1.0), ("adamw", 1e-2, 2.0), ("adamw-default", 1e-3, 3.0),
            ("muon", 0.02, 4.0), ("ng", 1.0, 5.0),
        )
    ]  # fmt: skip
    done.append(made_up("vit", "muon", 0.06, 1, None, is_diverged=True))
    return Outcome(wanted, known, done, ["task chess left out: needs a board"], {1.0: done})


def test_all_is_written(outcome, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write(outcome, tmp_path)
    assert [path.name for path in paths] == ["results.md", "standings.png", "curves.png"]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in paths[1:])
    tables = outcome.tables()
    assert tables["gpt"]["adamw"].rank == tables["vit"]["ng"].rank == 1
    # Failed on both: no better than at the start.
    assert summary([table["ng"] for table in tables.values()])[3] == 0
    table = paths[0].read_text()
    assert "task chess left out" in table
    assert "| 3 ± 1 (0.001) |" in table.replace("**", "")
    assert "| NG | AdamW |" in table


def test_tables_need_no_learned_optimizer(outcome):
    known = {name: c for name, c in outcome.contenders.items() if not c.is_learned}
    done = with_averages(outcome.records, known)
    table = markdown(replace(outcome, contenders=known, records=done, stopped={}))
    assert "| AdamW | Muon |" in table and "NG" not in table
