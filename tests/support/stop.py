"""Programs that are stopped in the middle, together with what they started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.hold import READY

TESTS = Path(__file__).parents[1]


def stopped(code, arguments, number=signal.SIGKILL):
    """Start a program, and send it a signal where it waits for that.

    Args:
        code: Python, which makes the program wait by ``support.hold``.
        arguments: Of the program.
        number: Of the signal.

    Returns:
        Its status and what it printed. All processes that it had started have ended.
    """
    folders = sorted(path for path in TESTS.iterdir() if path.is_dir())
    places = os.pathsep.join(map(str, [TESTS, TESTS.parent, *folders]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    pipe, said = subprocess.PIPE, []
    with subprocess.Popen(
        command, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            if line.strip() == READY:
                break
            said.append(line)
        else:
            pytest.fail(f"ended by {process.wait()} before it could be stopped: {''.join(said)}")
        workers = _children(process.pid)
        process.send_signal(number)
        said.append(process.communicate()[0])  # it goes on, if it does, where its input ends
    while any(map(_alive, workers)):
        time.sleep(0.01)
    return process.returncode, "".join(said)


def check_resumes(train, trainer, module, data, folder, records, whole=None):
    """A training run, killed after its first saved state, goes on to the same weights and log.

    Args:
        train: Called with (TINY, data, out), TINY of the module; resumes with ``resume=True``.
        trainer: The class of what it trains.
        module: The test module that TINY is in.
        data: Folder of the networks.
        folder: Empty.
        records: Path of a log -> its records.
        whole: Result of the same run that nobody stopped, where there is one already.
    """
    config = sys.modules[module].TINY
    # Where not every state is saved, a step is in the log that is in none.
    before = config.save_every + 2
    code = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(1);"
        f"from support import hold; from {trainer.__module__} import {trainer.__name__} as trainer;"
        f"from {module} import TINY; from {train.__module__} import {train.__name__} as train;"
        f"hold.before(trainer, 'advance', {before});"
        "train(TINY, sys.argv[1], Path(sys.argv[2]))"
    )
    broken, whole = folder / "broken", whole or train(config, data, folder / "whole")
    status, _ = stopped(code, [data, broken])
    assert status == -signal.SIGKILL
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(config, data, broken)
    resumed = train(config, data, broken, resume=True)
    assert resumed.finished
    assert same_state(whole.state, resumed.state)
    logs = [[{**r, "seconds": 0} for r in records(one.log)] for one in (whole, resumed)]
    assert logs[0] == logs[1]


def same_state(one, other):
    """Whether two files hold the same tensors, bit for bit, NaN as well."""
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(
        a.shape == other[key].shape and a.numpy().tobytes() == other[key].numpy().tobytes()
        for key, a in one.items()
    )


def _children(pid):
    """Processes that one started, where /proc tells."""
    task = Path(f"/proc/{pid}/task/{pid}/children")
    return task.read_text().split() if task.exists() else []


def _alive(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty once it has ended
    except OSError:
        return False
