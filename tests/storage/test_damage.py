"""Damaged logs, records and states raise errors that name the file."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import save
from support.meta_training import TINY, little, train

from l2o_graph.datasets.cnn.files import load_cnns
from l2o_graph.inr import load_inrs
from l2o_graph.storage.shards import read_record
from meta_train.benchmarks import rows, tables
from meta_train.benchmarks.optimizers import main as benchmark
from meta_train.benchmarks.records import FILE, Record, Run
from meta_train.parsing import parsed
from meta_train.run import read_state, write_state

# Three steps leave a course of each family, and an evaluation at each end.
with little():
    SHORT = dataclasses.replace(TINY, outer_steps=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the controller's trainer, next to an empty data folder."""
    folder = tmp_path_factory.mktemp("run")
    train(SHORT, folder / "data", folder / "run")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def resume(run):
    return train(SHORT, run.parent / "data", run, resume=True)


# Logs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"7",
        b"{}",
        b'{"step": 1}',
        b'{"outer_step": "one"}',
        b'{"outer_step": 1} {"outer_step": 2}',
        b"[" * 100_000,
        b"",
    ],
)
def test_a_line_that_no_run_has_logged_is_named(run, line):
    log = run / "log.jsonl"
    first, *rest = log.read_bytes().splitlines(keepends=True)
    damaged = b"".join([first, line + b"\n", *rest])
    log.write_bytes(damaged)
    match = r"^'.*run/log.jsonl', line 2: expected a record of a run, JSON with 'outer_step'"
    with pytest.raises(ValueError, match=match) as caught:
        resume(run)
    assert len(str(caught.value)) < 1000
    assert log.read_bytes() == damaged, "left as it was"


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_last_line_that_was_cut_off_is_logged_again(run, cut):
    log = run / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-cut])
    assert resume(run).finished
    assert log.read_bytes() == whole.rpartition(b"\n{")[0] + b"\n"


# States -----------------------------------------------------------------------------------------


def changed(run, tensors=lambda found: found, **entries):
    """Change entries of the record of a state, or its tensors."""
    state = run / "state.safetensors"
    record, found = read_state(state)
    write_state(state, {**record, **entries}, tensors(dict(found)))


def without(run, name):
    record, tensors = read_state(run / "state.safetensors")
    write_state(run / "state.safetensors", {k: v for k, v in record.items() if k != name}, tensors)


def other(name, value):
    def change(tensors):
        assert name in tensors
        return {**tensors, name: value}

    return lambda run: changed(run, change)


STATES = {
    "cut": lambda run: cut_off(run / "state.safetensors"),
    "garbage": lambda run: (run / "state.safetensors").write_bytes(b"garbage" * 99),
    "nothing": lambda run: (run / "state.safetensors").write_bytes(b""),
    "no record": lambda run: (run / "state.safetensors").write_bytes(save({"a": torch.ones(1)})),
    "a list for the configuration": lambda run: changed(run, config=[1]),
    "no step": lambda run: without(run, "outer_step"),
    "no draws": lambda run: changed(run, draws=[]),
    "draws that are none": lambda run: changed(run, draws=[{"family": "regression"}] * 2),
    "ages of another number": lambda run: changed(run, ages=[1]),
    "a step that was never taken": lambda run: changed(run, outer_step=99),
    "a step in words": lambda run: changed(run, outer_step="two"),
    "time in words": lambda run: changed(run, seconds="long"),
    "a count of courses in words": lambda run: changed(run, started="two"),
    "no weights": lambda run: changed(run, lambda tensors: {}),
    "weights of another shape": other("weights", torch.ones(())),
    "an average of another shape": other("average", torch.ones(3)),
    "a velocity of another shape": other("velocity", torch.ones(3)),
    "no such generator": other("generator", torch.ones(3, dtype=torch.uint8)),
    "a course of another shape": other("course.0.rows", torch.ones(1)),
}


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_none_is_named(run, name):
    STATES[name](run)
    damaged = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    match = r"^'.*run/state.safetensors': expected the state of a run, found: "
    with pytest.raises(ValueError, match=match) as caught:
        resume(run)
    assert len(str(caught.value)) < 1000
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == damaged


# Records of benchmarks --------------------------------------------------------------------------

STRANGER = {
    "run": {"task": "flow", "optimizer": "adamw-default", "rate": 0.001, "seed": 1, "steps": 3},
    "start": 1.0, "merits": {"3": 0.5}, "averaged": {}, "curve": [1.0], "diverged": False,
    "pass_seconds": 0.1, "update_seconds": 0.1, "update_seconds_mean": 0.1, "seconds": 1.0,
    "torch": "2", "date": "c",
}  # fmt: skip

RECORDS = {
    "a list": lambda record: [record],
    "a word": lambda record: "fast",
    "another field": lambda record: {**record, "colour": "red"},
    "no curve": lambda record: {k: v for k, v in record.items() if k != "curve"},
    "a curve of words": lambda record: {**record, "curve": ["low"]},
    "a number for a curve": lambda record: {**record, "curve": 1.0},
    "no number": lambda record: {**record, "update_seconds": float("nan")},
    "a truth for a number": lambda record: {**record, "update_seconds": True},
    "a run that is none": lambda record: {**record, "run": "first"},
    "a rate in words": lambda record: {**record, "run": {**record["run"], "rate": "low"}},
    "a task that is a list": lambda record: {**record, "run": {**record["run"], "task": []}},
}


@pytest.mark.parametrize("damage", RECORDS)
def test_lines_of_strangers_that_are_none_are_named(tmp_path, damage, capsys):
    path = tmp_path / FILE
    lines = [json.dumps(STRANGER), json.dumps(RECORDS[damage](STRANGER))]
    path.write_text("\n".join(lines) + "\n")
    given = ["--tasks", "flow", "--optimizers", "adamw-default", "--data-root", "sample"]
    assert benchmark([*given, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmark: '{path}', line 2: not a run of this benchmark")


@pytest.mark.parametrize("line", [b"garbage", b"\xff\xfe\x00", b"{}", b"[" * 100_000])
def test_a_line_that_is_no_record_is_named(tmp_path, line, capsys):
    (tmp_path / FILE).write_bytes(json.dumps(STRANGER).encode() + b"\n" + line + b"\n")
    given = ["--tasks", "flow", "--optimizers", "adamw-default", "--finished"]
    assert benchmark([*given, "--out", str(tmp_path)]) == 2
    assert f"benchmark: '{tmp_path / FILE}', line 2: not a run" in capsys.readouterr().err


def test_what_is_whole_is_read_as_it_was_written():
    record = parsed(Record, STRANGER, "record")
    assert record.merits == {3: 0.5} and record.run == Run(**STRANGER["run"])
    assert record.run.device == "cpu"  # which earlier records lack
    again = json.loads(json.dumps(dataclasses.asdict(record)))
    assert again["run"].items() >= STRANGER["run"].items()
    assert {**again, "run": STRANGER["run"]} == STRANGER
    nothing = parsed(Record, {**STRANGER, "merits": {"3": None}}, "record")
    assert nothing.merit is None


# What tables are made of ------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, save({"a": torch.ones(1)})])
def test_a_checkpoint_without_its_provenance_is_named(tmp_path, content):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^checkpoint '{path}': expected how it was made, found"):
        tables.provenance(path)


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\n", b'{"accuracy": 1, "prediction": []}'])
def test_predictions_that_are_none_are_named(tmp_path, content):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^'{path}': expected accuracies and predictions"):
        rows.predictions({"NG-GNN": tmp_path})


@pytest.mark.parametrize(
    "tensors", [{}, {"drawn": torch.ones(2)}, dict.fromkeys(("drawn", "edited"), torch.ones(1, 3))]
)
def test_images_that_are_none_are_named(tmp_path, tensors):
    path = tmp_path / "edited.safetensors"
    path.write_bytes(save({name: t.clone() for name, t in tensors.items()}))
    with pytest.raises(ValueError, match=rf"^'{path}': expected images of networks, found"):
        rows.edited_digits({"NG-GNN": tmp_path})


# Sets of networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["[]", "7", "{}", '{"format": []}', "[" * 100_000])
def test_a_header_that_is_none_is_named(tmp_path, record):
    path = tmp_path / "train-00000.safetensors"
    path.write_bytes(save({"a": torch.ones(1)}, {"record": record}))
    with pytest.raises(ValueError, match=rf"^INRs '{path}': expected "):
        read_record(path, "INRs")


def shard(path, kind, **record):
    record = {"format": f"l2o_graph {kind}", "version": 1, **record}
    path.write_bytes(save({"a": torch.ones(1)}, {"record": json.dumps(record)}))
    return path


def test_shards_of_inrs_that_lack_what_they_should_have_are_named(tmp_path):
    path = shard(tmp_path / "train-00000.safetensors", "INRs")
    with pytest.raises(ValueError, match=rf"INRs '{path}': expected its index and the number of"):
        load_inrs(tmp_path, "train")
    shard(path, "INRs", shards=1, shard=0, omega0=30.0)
    with pytest.raises(
        ValueError, match="split 'train': expected omega0, and the same tensors in all"
    ):
        load_inrs(tmp_path, "train")


@pytest.mark.parametrize(
    "runs", [7, [{}], [{"run": 1, "architecture": {"channels": [1]}, "hyperparameters": {}}]]
)
def test_shards_of_cnns_that_lack_what_they_should_have_are_named(tmp_path, runs):
    path, place = tmp_path / "train-00000.safetensors", {"shard": 0, "shards": 1}
    shard(path, "CNNs", runs=runs, split="train", **place)
    with pytest.raises(ValueError, match=r"train-00000.safetensors': expected a split and runs"):
        load_cnns(tmp_path, "train")
