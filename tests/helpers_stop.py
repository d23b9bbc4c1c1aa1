"""Commands that are stopped in the middle, together with what they started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file


def stopped(command, ready, number=signal.SIGKILL):
    """Start a command, wait until ``ready()``, send it a signal; its status and what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.003)
    workers = _children(process.pid)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(_alive, workers))
    return process.returncode, out


def check_resumes(train, module, data, folder, records):
    """A training run, killed after its first saved state, goes on to the same weights and log.

    Args:
        train: Called with (TINY, data, out), TINY of the module; resumes with ``resume=True``.
        module: The test module that TINY is in.
        data: Folder of the networks.
        folder: Empty.
        records: Path of a log -> its records.
    """
    code = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(1);"
        "sys.path.insert(0, sys.argv[3]);"
        f"from {module} import TINY; from {train.__module__} import {train.__name__} as train;"
        "train(TINY, sys.argv[1], Path(sys.argv[2]))"
    )
    config = sys.modules[module].TINY
    whole, broken = train(config, data, folder / "whole"), folder / "broken"
    command = [sys.executable, "-c", code, str(data), str(broken), str(Path(__file__).parent)]
    status, _ = stopped(command, (broken / "state.safetensors").exists)
    assert status == -signal.SIGKILL, "killed before it was done"
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
