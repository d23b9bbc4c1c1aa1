"""One run per folder; leftovers of killed runs do not block later ones."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.meta_training import TINY, train

from l2o_graph.datasets.cnn.generate import main as train_zoo
from l2o_graph.datasets.inr.generate import main as fit_inrs
from l2o_graph.storage import lock
from l2o_graph.storage.files import write_atomically
from l2o_graph.storage.lock import LOCK, held
from meta_train.__main__ import main as meta_train
from meta_train.benchmarks.optimizers import main as benchmark
from meta_train.benchmarks.tables import main as tables

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from l2o_graph.storage.files import write_atomically
from l2o_graph.storage.lock import held

with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def another_process(folder):
    """Run a process that holds a folder until the end of the block."""
    pipe, env = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        if process.poll() is None:
            process.communicate("\n")


def test_the_second_is_told_who_holds_the_folder(tmp_path):
    folder = tmp_path / "run"
    with another_process(folder) as process:
        match = rf"^folder '.*run' is in use by process {process.pid} on .* since .*; wait for it"
        with pytest.raises(BlockingIOError, match=match), held(folder):
            pass
        with held(tmp_path / "other"):
            pass
    with held(folder):
        pass
    assert not list(folder.iterdir()), "nothing is left behind"


def test_one_process_does_not_hold_a_folder_twice(tmp_path):
    match = f"process {os.getpid()} "
    with held(tmp_path), pytest.raises(BlockingIOError, match=match), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_a_lock_does_not_outlive_a_killed_process(tmp_path):
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / LOCK).exists()
        with held(tmp_path):
            assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()


def test_a_lock_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        raise ZeroDivisionError
    with held(tmp_path):
        pass


def test_a_file_system_without_locks_has_them_elsewhere(tmp_path, monkeypatch):
    take = lock._lock

    def without(file):
        if Path(file.name).parent == tmp_path:
            raise OSError(errno.ENOLCK, "No locks available")
        take(file)

    monkeypatch.setattr(lock, "_lock", without)
    match = f"process {os.getpid()} "
    with held(tmp_path), pytest.raises(BlockingIOError, match=match), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_what_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    match = r"out: cannot write to folder '.*file/run' \(Not a directory\)"
    with pytest.raises(OSError, match=match), held(tmp_path / "file" / "run"):
        pass


COMMANDS = {
    "meta_train": (meta_train, ["--task", "general"]),
    "paper": (meta_train, ["--preset", "paper", "--task", "fmnist_sample"]),
    "benchmark": (benchmark, ["--tasks", "fmnist_sample", "--optimizers", "adam", "--seeds", "1"]),
    "flow": (benchmark, ["--tasks", "flow", "--optimizers", "adamw-default"]),
    "inr": (fit_inrs, ["--source", "fmnist_sample", "--count", "8", "--steps", "1"]),
    "zoo": (train_zoo, ["--dataset", "fmnist_sample", "--runs", "1", "--test-images", "50"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_a_folder_refuses_one_in_use(name, tmp_path, capsys):
    command, options = COMMANDS[name]
    with another_process(tmp_path) as process:
        status = command([*options, "--out", str(tmp_path)])
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert status == 2
    error = capsys.readouterr().err
    assert f"folder '{tmp_path}' is in use by process {process.pid} on " in error
    assert "Traceback" not in error


def test_a_table_refuses_a_folder_in_use(tmp_path, capsys):
    with another_process(tmp_path / "mnist_inr") as process:
        assert tables(["mnist_inr", "--out", str(tmp_path)]) == 2
    assert f"in use by process {process.pid} on " in capsys.readouterr().err


def test_what_is_finished_is_reported_beside_a_running_command(tmp_path, capsys):
    given = ["--tasks", "flow", "--optimizers", "adamw-default", "--data-root", "sample"]
    given += ["--steps", "8", "--out", str(tmp_path)]
    assert benchmark(given) == 0
    with another_process(tmp_path):
        assert benchmark(given) == 2
        assert benchmark([*given, "--finished"]) == 0
    assert f"wrote {tmp_path / 'results.md'}" in capsys.readouterr().out


def test_a_killed_run_is_resumed_and_a_running_one_is_not(tmp_path):
    data = tmp_path / "data"  # empty: images are those of the packaged sample
    train(TINY, data, tmp_path / "run")
    with another_process(tmp_path / "run") as process:
        with pytest.raises(BlockingIOError, match=f"process {process.pid} "):
            train(TINY, data, tmp_path / "run", resume=True)
        process.kill()
        process.wait()
        assert train(TINY, data, tmp_path / "run", resume=True).finished


# Partial files ---------------------------------------------------------------------------------

WRITE = """
import os, signal, sys
from pathlib import Path
from l2o_graph.storage.files import write_atomically

os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), b"half")
"""


def killed_while_it_wrote(path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WRITE, str(path)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = [other for other in path.parent.iterdir() if other.name.endswith(".partial")]
    assert not path.exists()
    return left


def test_what_a_killed_process_had_half_written_goes_with_the_next_writing(tmp_path):
    path = tmp_path / "state.safetensors"
    killed_while_it_wrote(path)
    write_atomically(path, b"whole")
    assert [other.name for other in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"whole"


def test_it_goes_with_the_next_run_in_the_folder(tmp_path):
    killed_while_it_wrote(tmp_path / "train-00000.safetensors")
    with held(tmp_path):
        assert [other.name for other in tmp_path.iterdir()] == [LOCK]


def test_what_others_are_writing_stays(tmp_path):
    path = tmp_path / "state.safetensors"
    with another_process(tmp_path / "elsewhere") as process:
        other = tmp_path / f".{path.name}.{process.pid}.partial"
        other.write_bytes(b"at work")
        another_file = tmp_path / ".log.1.partial.txt"
        another_file.write_text("somebody's own")
        with held(tmp_path):
            write_atomically(path, b"whole")
        assert sorted(tmp_path.iterdir()) == sorted(
            [other, another_file, path, tmp_path / "elsewhere"]
        )
