"""Runs and what came of them, kept as lines of JSON."""

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
    """One training run; runs that are equal here give the same result."""

    task: str
    optimizer: str
    rate: float
    seed: int  # of initialisation and batches
    steps: int  # which a schedule is planned for
    checkpoint: str = ""  # identity of a learned optimizer's weights
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Record:
    """What came of a run."""

    run: Run
    start: float  # figure of merit before the first step
    merits: dict[int, float | None]  # after so many steps; None where there was no number
    averaged: dict[int, float | None]  # the same at averaged weights, where the run gives both
    curve: list[float]  # training loss, mean of each of up to a hundred parts of the run
    diverged: bool  # the loss became non-finite, which ends a run
    pass_seconds: float  # median of a forward and backward pass
    update_seconds: float  # median of the optimizer's part
    update_seconds_mean: float  # some steps do more than others
    seconds: float  # of the whole run
    torch: str  # version
    date: str  # when it ended, UTC

    @property
    def merit(self) -> float | None:
        """At the end of the run."""
        return self.merits.get(self.run.steps)

    def stopped(self, steps: int) -> "Record":
        """The record as if the run had ended after so many steps."""
        merits, averaged = ({steps: m.get(steps)} for m in (self.merits, self.averaged))
        run = replace(self.run, steps=steps)
        return replace(self, run=run, merits=merits, averaged=averaged)


def add(folder: Path, record: Record) -> None:
    """Append a record to a folder that this process holds."""
    path = folder / FILE
    line = json.dumps(asdict(record), allow_nan=False)
    before = path.read_bytes() if path.exists() else b""
    torn = bool(before) and not before.endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[Run, Record]:
    """All records of a folder; a line that was not written to its end is passed over.

    Raises:
        ValueError: When the file is something else.
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
                if line.startswith(BEGINNING[: len(line)]):  # a run was killed while it wrote
                    continue
                raise
            record = parsed(Record, content, "record")
            found[record.run] = record
    return found
