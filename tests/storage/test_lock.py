"""One run per folder; leftovers of killed runs do not block later ones."""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.meta_training import TINY, little, train

from l2o_graph.datasets.cnn.generate import main as train_zoo
from l2o_graph.datasets.inr.generate import main as fit_inrs
from l2o_graph.storage import lock
from l2o_graph.storage.files import write_atomically
from l2o_graph.storage.lock import LOCK, held
from meta_train.__main__ import main as meta_train
from meta_train.benchmarks.optimizers import main as benchmark
from meta_train.benchmarks.tables import main as tables

ROOT = Path(__file__).parents[2]
# Holds one folder after another, each until the next line of its input.
HOLD = """
import sys
from pathlib import Path
from l2o_graph.storage.lock import held

while folder := sys.stdin.readline().rstrip():
    with held(Path(folder)):
        print("held", flush=True)
        sys.stdin.readline()
    print("left", flush=True)
"""


class Other:
    """A process beside this one. It is started once, as that takes seconds, and again if killed."""

    def __init__(self):
        self.process = None

    @contextlib.contextmanager
    def holds(self, folder):
        """Let it hold a folder until the end of the block."""
        if self.process is None or self.process.poll() is not None:
            self.end()
            pipe, env = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", HOLD]
            self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)
        assert self._answer(folder) == "held\n"
        try:
            yield self.process
        finally:
            if self.process.poll() is None:
                assert self._answer("") == "left\n"

    def _answer(self, line):
        print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline()

    def end(self):
        if self.process is not None:
            self.process.communicate()


@pytest.fixture(scope="module")
def other():
    other = Other()
    yield other
    other.end()


def test_the_second_is_told_who_holds_the_folder(tmp_path, other):
    folder = tmp_path / "run"
    with other.holds(folder) as process:
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


def test_a_lock_does_not_outlive_a_killed_process(tmp_path, other):
    with other.holds(tmp_path) as process:
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
def test_every_command_that_writes_a_folder_refuses_one_in_use(name, tmp_path, capsys, other):
    command, options = COMMANDS[name]
    with other.holds(tmp_path) as process:
        status = command([*options, "--out", str(tmp_path)])
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert status == 2
    error = capsys.readouterr().err
    assert f"folder '{tmp_path}' is in use by process {process.pid} on " in error
    assert "Traceback" not in error


def test_a_table_refuses_a_folder_in_use(tmp_path, capsys, other):
    with other.holds(tmp_path / "mnist_inr") as process:
        assert tables(["mnist_inr", "--out", str(tmp_path)]) == 2
    assert f"in use by process {process.pid} on " in capsys.readouterr().err


def test_what_is_finished_is_reported_beside_a_running_command(tmp_path, capsys, other):
    given = ["--tasks", "flow", "--optimizers", "adamw-default", "--data-root", "sample"]
    given += ["--steps", "8", "--out", str(tmp_path)]
    assert benchmark(given) == 0
    with other.holds(tmp_path):
        assert benchmark(given) == 2
        assert benchmark([*given, "--finished"]) == 0
    assert f"wrote {tmp_path / 'results.md'}" in capsys.readouterr().out


def test_a_killed_run_is_resumed_and_a_running_one_is_not(tmp_path, other):
    data = tmp_path / "data"  # empty: images are those of the packaged sample
    with little():
        short = dataclasses.replace(TINY, outer_steps=1)
    train(short, data, tmp_path / "run")
    with other.holds(tmp_path / "run") as process:
        with pytest.raises(BlockingIOError, match=f"process {process.pid} "):
            train(short, data, tmp_path / "run", resume=True)
        process.kill()
        process.wait()
        assert train(short, data, tmp_path / "run", resume=True).finished


# Partial files ---------------------------------------------------------------------------------

WRITE = """
import os, signal, sys
from pathlib import Path
from l2o_graph.storage.files import write_atomically

os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), b"half")
"""


@pytest.fixture(scope="module")
def killed_while_it_wrote(tmp_path_factory):
    """A folder in which a process was killed while it wrote a file, and that file's name."""
    folder = tmp_path_factory.mktemp("killed")
    path, env = folder / "state.safetensors", {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WRITE, str(path)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    assert left.suffix == ".partial"
    return folder, path.name


def test_what_a_killed_process_had_half_written_goes_with_the_next_writing(
    tmp_path, killed_while_it_wrote
):
    folder, name = killed_while_it_wrote
    path = shutil.copytree(folder, tmp_path / "run") / name
    write_atomically(path, b"whole")
    assert [one.name for one in path.parent.iterdir()] == [name]
    assert path.read_bytes() == b"whole"


def test_it_goes_with_the_next_run_in_the_folder(tmp_path, killed_while_it_wrote):
    run = shutil.copytree(killed_while_it_wrote[0], tmp_path / "run")
    with held(run):
        assert [path.name for path in run.iterdir()] == [LOCK]


def test_what_others_are_writing_stays(tmp_path, other):
    path = tmp_path / "state.safetensors"
    with other.holds(tmp_path / "elsewhere") as process:
        half = tmp_path / f".{path.name}.{process.pid}.partial"
        half.write_bytes(b"at work")
        another_file = tmp_path / ".log.1.partial.txt"
        another_file.write_text("somebody's own")
        with held(tmp_path):
            write_atomically(path, b"whole")
        assert sorted(tmp_path.iterdir()) == sorted(
            [half, another_file, path, tmp_path / "elsewhere"]
        )
