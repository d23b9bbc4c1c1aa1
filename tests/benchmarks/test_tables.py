"""Tables of models that read networks: what they hold is what the runs came to."""

import contextlib
import io
import json
import shutil
import signal

import pytest
from support.stop import stopped

from l2o_graph.datasets.inr.generate import main as fit_inrs
from meta_train.benchmarks.rows import TABLES
from meta_train.benchmarks.tables import Settings, main, provenance
from meta_train.run import read_state, write_state


@pytest.fixture(scope="module")
def inrs(tmp_path_factory):
    """24 images to train on, 8 and 8 to judge by."""
    out = tmp_path_factory.mktemp("inrs")
    given = ["--source", "fmnist_sample", "--jobs", "1", "--steps", "20", "--batch", "8"]
    assert fit_inrs([*given, "--count", "24", "8", "8", "--out", str(out)]) == 0
    return out


def asked(out, inrs, *more, seeds=2):
    given = ["mnist_inr", "--only", "MLP", "NG-GNN, 4", "--hidden", "8", "--out", str(out)]
    given += ["--seeds", str(seeds), "--", "--inrs", str(inrs), "--epochs", "1", "--batch", "8"]
    return [*given, *more]


@pytest.fixture(scope="module")
def made(inrs, tmp_path_factory):
    """A folder with a finished table, which tests read alone, and what was printed."""
    out, printed = tmp_path_factory.mktemp("tables"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(asked(out, inrs)) == 0
    return out, printed.getvalue()


def test_a_table_holds_what_its_runs_came_to_and_is_not_made_twice(inrs, made):
    out, first = made
    assert (out / "mnist_inr-some.md").read_text() in first
    folders = [out / "mnist_inr" / f"ng_gnn-probes-4-{seed}" for seed in (0, 1)]
    found = [provenance(folder / "checkpoint.safetensors") for folder in folders]
    mean = 100 * sum(each["test_accuracy"] for each in found) / 2
    (row,) = [line for line in first.splitlines() if line.startswith("| NG-GNN, 4 probes")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{found[0]['parameters']:,}"
    assert float(cells[2].split(" ± ")[0]) == pytest.approx(mean, abs=0.005)
    assert (cells[3], cells[5]) == ("2", "91.8 ± 0.5")

    states = sorted(out.rglob("state.safetensors"))
    before = [path.stat().st_mtime_ns for path in states]
    assert len(before) == 4
    assert main(asked(out, inrs)) == 0
    assert [path.stat().st_mtime_ns for path in states] == before


def test_the_width_is_that_of_graph_models_alone(made):
    widths = {
        name: json.loads((made[0] / "mnist_inr" / name / "config.json").read_text())
        for name in ("mlp-0", "ng_gnn-probes-4-0")
    }
    assert widths["mlp-0"]["model"]["hidden"] == 256
    assert widths["ng_gnn-probes-4-0"]["model"]["hidden"] == 8


def test_rows_that_do_not_end_are_left_out_and_say_where_to_look(inrs, tmp_path, capsys):
    assert main(asked(tmp_path, inrs, "--no-such-option")) == 1
    said = capsys.readouterr()
    assert "no row finished, nothing written" in said.err
    assert not list(tmp_path.glob("*.md"))
    place = tmp_path / "mnist_inr" / "mlp-0" / "output.txt"
    assert f"MLP, seed 0: see {place}" in said.err
    assert "unrecognized arguments: --no-such-option" in place.read_text()


def test_an_error_of_any_kind_ends_one_row_alone(inrs, made, tmp_path):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "mnist_inr-some.md").read_text()
    state = tmp_path / "mnist_inr" / "mlp-1" / "state.safetensors"
    write_state(state, read_state(state)[0], {})  # a run without its weights
    assert main(asked(tmp_path, inrs)) == 1
    said = (state.parent / "output.txt").read_text()
    assert f"meta_train: '{state}': expected the state of a run, found: " in said
    rows = (tmp_path / "mnist_inr-some.md").read_text().splitlines()
    assert [row.split(" | ")[3] for row in rows[2:4]] == ["1", "2"]
    assert rows[3] == whole.splitlines()[3]


# A table that waits for a signal before the second step of its first run.
HELD = """
import sys
from support import hold
from meta_train.supervised.inr import INRTrainer
from meta_train.benchmarks.tables import main

hold.before(INRTrainer, "advance", 2)
sys.exit(main())
"""


def test_an_interrupt_ends_the_table_and_the_same_command_goes_on(inrs, tmp_path):
    options = asked(tmp_path, inrs, seeds=1)
    assert stopped(HELD, options, signal.SIGINT)[0] == 130
    assert [path.name for path in (tmp_path / "mnist_inr").iterdir()] == ["mlp-0"]
    assert main(options) == 0


def test_requests_that_cannot_be_met(tmp_path, capsys):
    assert main(["mnist_inr", "--only", "no such row", "--out", str(tmp_path)]) == 2
    assert "expected words of one of ['MLP', 'Set NN'" in capsys.readouterr().err
    assert main(["mnist_inr", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "seeds: expected at least 1, found 0" in capsys.readouterr().err


def test_rows_are_chosen_by_whole_words():
    def labels(*only):
        return [row.label for row in Settings("mnist_inr", only).rows]

    assert labels("4 probes") == ["NG-GNN, 4 probes", "NG-T, 4 probes"]
    assert labels("MLP", "NG-T, 64 probes") == ["MLP", "NG-T, 64 probes"], "whole labels"
    assert labels("NG-T, 64") == ["NG-T, 64 probes", "NG-T, 64 probes, canonical"]
    assert len(labels("NG-GNN")) == 7
    assert len(labels()) == len(TABLES["mnist_inr"].rows)


@pytest.mark.parametrize("name", TABLES)
def test_rows_have_folders_of_their_own(name):
    folders = [row.name for row in TABLES[name].rows]
    assert len(set(folders)) == len(folders)
