"""Training of all models in a result table of the paper, over several seeds.

    python -m meta_train.tables mnist_inr --seeds 2 --jobs 2 --hidden 32 -- --inrs DIR --epochs 10

Each row is a model that ``python -m meta_train`` trains; options after ``--`` are passed to it.
Runs are stored in ``--out``, and the same command continues with those that are missing or were
interrupted. Results are on the test split, for the checkpoint that is best on the validation split.
"""

import argparse
import contextlib
import json
import re
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors import safe_open
from tqdm import tqdm

from l2o_graph.commands import ERRORS, run_command
from l2o_graph.datasets.workers import in_parallel
from l2o_graph.metanets.config import GRAPH_MODELS
from l2o_graph.ranges import COUNT, COUNT_OR_NONE, check_ranges
from l2o_graph.storage.files import expecting, write_atomically
from l2o_graph.storage.lock import held
from meta_train.__main__ import main as train
from meta_train.benchmarks.judge import format_mean
from meta_train.benchmarks.report import table
from meta_train.benchmarks.rows import TABLES, Row, Table
from meta_train.parsing import parsed

INTERRUPTED = 130  # exit status of an interrupted run


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a table."""

    table: str  # name in ``TABLES``
    only: Sequence[str] = ()  # labels of rows, or words in labels; empty for all rows
    seeds: int = 2  # number of seeds, from 0 on
    hidden: int = 0  # channels of the graph models; 0 for the published ones
    extra: Sequence[str] = ()  # additional options of every run
    out: Path = Path("runs/tables")  # folder of the runs and the table
    jobs: int = 1  # number of parallel runs, with one thread each

    def __post_init__(self) -> None:
        check_ranges(self, seeds=COUNT, hidden=COUNT_OR_NONE, jobs=COUNT)

    @property
    def rows(self) -> list[Row]:
        """Selected rows; raises a ValueError if there are none."""
        every = TABLES[self.table].rows
        labels = [row.label for row in every]
        words = "|".join(re.escape(part) for part in self.only if part not in labels)
        chosen = {label for label in labels if words and re.search(rf"\b({words})\b", label)}
        found = [row for row in every if not self.only or row.label in (*chosen, *self.only)]
        if not found:
            raise ValueError(f"only: expected words of one of {labels}, found {list(self.only)}")
        return found

    def folder(self, row: Row, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / self.table / f"{row.name}-{seed}"


def fill(settings: Settings) -> dict[Row, list[dict[str, Any]]]:
    """Train each row with each seed.

    Returns:
        For each row, provenance of the best checkpoint of each run that finished.

    Raises:
        ValueError: For unknown rows.
        BlockingIOError: If another process uses the folder.
        OSError: If the folder cannot be written to.
    """
    rows = settings.rows
    runs = [(row, seed) for seed in range(settings.seeds) for row in rows]
    answers: dict[Row, list[dict[str, Any]]] = {row: [] for row in rows}
    with (
        held(settings.out / settings.table),
        tqdm(total=len(runs), unit="run", smoothing=0) as progress,
    ):
        for row, seed, found in in_parallel(partial(_train, settings), runs, settings.jobs):
            progress.update()
            text = found
            if not isinstance(found, str):
                answers[row].append(found)
                result = _result(TABLES[settings.table], [found])
                text = f"{result}, {found['minutes']} minutes"
            progress.write(f"{row.label}, seed {seed}: {text}", file=sys.stderr)
    return answers


def markdown(settings: Settings, answers: dict[Row, list[dict[str, Any]]]) -> str:
    """Format the table, with published results in the last column."""
    known = TABLES[settings.table]
    rows = [[settings.table, "parameters", known.unit, "seeds", "minutes", "paper"]]
    for row, found in answers.items():
        if found:
            minutes = fmean(each["minutes"] for each in found)
            rows.append([
                row.label, f"{found[0]['parameters']:,}", _result(known, found), str(len(found)),
                f"{minutes:.1f}", row.published,
            ])  # fmt: skip
    width = f"{settings.hidden} channels" if settings.hidden else "published sizes"
    given = " ".join(settings.extra) or "no further arguments"
    note = f"Graph models of {width}; {given}. The paper's figures are at its own scale."
    return f"{table(rows)}\n\n{note}\n"


def write(settings: Settings, answers: dict[Row, list[dict[str, Any]]]) -> list[Path]:
    """Write the table, and a plot of the rows that finished; return their paths."""
    # Selected rows do not overwrite the whole table.
    name = settings.table + ("-some" if settings.only else "")
    paths = [settings.out / f"{name}.md"]
    write_atomically(paths[0], markdown(settings, answers).encode())
    finished = {
        row.label: settings.folder(row, 0)
        for row, found in answers.items()
        if len(found) == settings.seeds
    }
    if finished:
        paths.append(paths[0].with_suffix(".png"))
        write_atomically(paths[1], TABLES[settings.table].plot(finished))
    return paths


def provenance(checkpoint: Path) -> dict[str, Any]:
    """Read how a checkpoint was trained, and its results.

    Raises:
        ValueError: For a file that is not a checkpoint.
        OSError: For a missing file.
    """
    with (
        expecting(f"checkpoint '{checkpoint}': expected how it was made"),
        safe_open(checkpoint, framework="pt") as file,
    ):
        return dict(json.loads(file.metadata()["provenance"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 if all runs finished, 1 if some did not, 2 for bad input, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.tables", description=(__doc__ or "").partition("\n")[0],
        epilog="Options after -- are passed to each python -m meta_train.",
    )  # fmt: skip
    add = parser.add_argument
    add("table", choices=sorted(TABLES), help="table to train")
    text = "rows with these words in their label"
    add("--only", nargs="+", default=[], metavar="LABEL", help=text)
    add("--seeds", type=int, default=2, help="number of seeds, from 0 on")
    add("--hidden", type=int, default=0, help="channels of the graph models; 0: the paper's")
    text = "folder for results"
    add("--out", type=Path, default=Path("runs/tables"), metavar="FOLDER", help=text)
    add("--jobs", type=int, default=1, help="parallel runs, with one thread each")
    args = vars(parser.parse_args(argv[:cut]))
    complete = False

    def work() -> list[str]:
        nonlocal complete
        settings = Settings(**args, extra=argv[cut + 1 :])
        answers = fill(settings)
        if not any(answers.values()):
            print("tables: no row finished, nothing written", file=sys.stderr)
            return []
        paths = write(settings, answers)
        complete = all(len(found) == settings.seeds for found in answers.values())
        return [paths[0].read_text(), f"wrote {' and '.join(map(str, paths))}"]

    return run_command("tables", work, (*ERRORS, BrokenProcessPool)) or int(not complete)


def _train(settings: Settings, run: tuple[Row, int]) -> tuple[Row, int, dict[str, Any] | str]:
    """Train a row with a seed; return the checkpoint's provenance, or why there is none.

    The output of the run goes to a file in its folder.
    """
    row, seed = run
    folder, known = settings.folder(row, seed), TABLES[settings.table]
    hidden = ()
    if settings.hidden and row.arguments.split()[0] in GRAPH_MODELS:
        hidden = ("--hidden", str(settings.hidden))
    arguments = (
        "--task", known.task or settings.table,
        "--model", *row.arguments.split(), *hidden, *settings.extra,
        "--seed", str(seed), "--out", str(folder), "--resume",
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    output, checkpoint = folder / "output.txt", folder / "checkpoint.safetensors"
    with (
        output.open("a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            status = train(list(arguments))
        except SystemExit as error:  # from argparse, for unknown options
            status = int(error.code or 0)
        except Exception:  # does not affect the other rows
            traceback.print_exc()
            status = 1
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        return row, seed, f"see {output}"
    try:
        found = provenance(checkpoint)
        for name in ("parameters", "minutes", known.measure):
            with expecting(f"checkpoint '{checkpoint}': expected a number '{name}'"):
                parsed(float, found[name], name)
    except (ValueError, OSError) as error:
        return row, seed, str(error)
    return row, seed, found


def _result(table: Table, found: Sequence[dict[str, Any]]) -> str:
    digits = f".{table.digits}f"
    return format_mean([table.scale * each[table.measure] for each in found], digits, digits)
