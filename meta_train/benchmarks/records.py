"""Runs of the benchmark and their results, stored as lines of JSON."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from l2o_graph.storage.files import expecting
from meta_train.parsing import parsed

FILE = "runs.jsonl"
BEGINNING = b'{"run": {'  # of every line


@dataclass(frozen=True, slots=True)
class Run:
    """Training run; equal runs give the same result."""

    task: str
    optimizer: str
    rate: float  # learning rate
    seed: int  # seed of the initialisation and of the batches
    steps: int  # number of steps, also that of the schedule
    checkpoint: str = ""  # hash of the weights of a learned optimizer
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Record:
    """Result of a run."""

    run: Run
    start: float  # figure of merit before training
    merits: dict[int, float | None]  # figure of merit by number of steps; None if not finite
    averaged: dict[int, float | None]  # the same for averaged weights, if there are any
    curve: list[float]  # training losses, averaged over each of up to 100 parts of the run
    diverged: bool  # whether the loss became infinite or NaN, which ends a run
    pass_seconds: float  # median time of a forward and backward pass
    update_seconds: float  # median time of the optimizer's step
    update_seconds_mean: float  # mean time of the optimizer's step; steps differ
    seconds: float  # time of the whole run
    torch: str  # version of torch
    date: str  # time at the end, UTC

    @property
    def merit(self) -> float | None:
        """Figure of merit at the end of the run."""
        return self.merits.get(self.run.steps)

    def stopped(self, steps: int) -> "Record":
        """Return the record of the first part of the run."""
        merits, averaged = ({steps: m.get(steps)} for m in (self.merits, self.averaged))
        run = replace(self.run, steps=steps)
        return replace(self, run=run, merits=merits, averaged=averaged)


def add(folder: Path, record: Record) -> None:
    """Append a record to the file in a folder, which this process has locked."""
    path = folder / FILE
    line = json.dumps(asdict(record), allow_nan=False)
    before = path.read_bytes() if path.exists() else b""
    torn = bool(before) and not before.endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[Run, Record]:
    """Read all records of a folder; skip lines that were only partly written.

    Raises:
        ValueError: For a file with other lines.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    found: dict[Run, Record] = {}
    for at, line in enumerate(path.read_bytes().splitlines(), 1):
        with expecting(
            f"'{path}', line {at}: not a run of this benchmark; move the file away or give "
            "another --out: expected a record"
        ):
            try:
                content = json.loads(line)
            except ValueError:
                if line.startswith(BEGINNING[: len(line)]):  # a run was killed while writing
                    continue
                raise
            record = parsed(Record, content, "record")
            found[record.run] = record
    return found
