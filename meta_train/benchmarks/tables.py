"""Tables of models that read networks: each row trained over seeds, and what the paper says of it.

    python -m meta_train.tables mnist_inr --seeds 2 --jobs 2 --hidden 32 -- --inrs DIR --epochs 10

A row is a model that ``python -m meta_train`` trains; what follows ``--`` goes to each of these
commands. Runs are kept in ``--out``: the same command goes on with those that are missing or were
interrupted. Reported is the test split at the evaluation that was best on the validation split.
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
from meta_train.benchmarks.judge import spread
from meta_train.benchmarks.report import table
from meta_train.benchmarks.rows import TABLES, Row, Table
from meta_train.parsing import parsed

INTERRUPTED = 130  # what a command answers that was told to stop


@dataclass(frozen=True, slots=True)
class Settings:
    """What to train."""

    table: str  # a name of ``TABLES``
    only: Sequence[str] = ()  # labels of rows, or words in them; () for all
    seeds: int = 2  # how many, from 0 on
    hidden: int = 0  # channels of the graph models; 0 for the published ones
    extra: Sequence[str] = ()  # further arguments of every run
    out: Path = Path("runs/tables")  # folder of the runs and the table
    jobs: int = 1  # runs at the same time, of one thread each

    def __post_init__(self) -> None:
        check_ranges(self, seeds=COUNT, hidden=COUNT_OR_NONE, jobs=COUNT)

    @property
    def rows(self) -> list[Row]:
        """Those that are asked for; a ValueError where there are none."""
        every = TABLES[self.table].rows
        labels = [row.label for row in every]
        words = "|".join(re.escape(part) for part in self.only if part not in labels)
        chosen = {label for label in labels if words and re.search(rf"\b({words})\b", label)}
        found = [row for row in every if not self.only or row.label in (*chosen, *self.only)]
        if not found:
            raise ValueError(f"only: expected words of one of {labels}, found {list(self.only)}")
        return found

    def folder(self, row: Row, seed: int) -> Path:
        """Of a run."""
        return self.out / self.table / f"{row.name}-{seed}"


def fill(settings: Settings) -> dict[Row, list[dict[str, Any]]]:
    """Train every row on every seed.

    Returns:
        The provenance of each run's best checkpoint; of runs that did not end, none.

    Raises:
        ValueError, OSError: For rows that are not there, and a folder that is written by another.
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
                figure = _figure(TABLES[settings.table], [found])
                text = f"{figure}, {found['minutes']} minutes"
            progress.write(f"{row.label}, seed {seed}: {text}", file=sys.stderr)
    return answers


def markdown(settings: Settings, answers: dict[Row, list[dict[str, Any]]]) -> str:
    """The table, its last column what the paper has."""
    known = TABLES[settings.table]
    rows = [[settings.table, "parameters", known.unit, "seeds", "minutes", "paper"]]
    for row, found in answers.items():
        if found:
            minutes = fmean(each["minutes"] for each in found)
            rows.append([
                row.label, f"{found[0]['parameters']:,}", _figure(known, found), str(len(found)),
                f"{minutes:.1f}", row.published,
            ])  # fmt: skip
    width = f"{settings.hidden} channels" if settings.hidden else "published sizes"
    given = " ".join(settings.extra) or "no further arguments"
    note = f"Graph models of {width}; {given}. The paper's figures are at its own scale."
    return f"{table(rows)}\n\n{note}\n"


def write(settings: Settings, answers: dict[Row, list[dict[str, Any]]]) -> list[Path]:
    """Write the table and, where there is something to see, its figure; returns their paths."""
    # Some rows alone do not take the place of the whole table.
    name = settings.table + ("-some" if settings.only else "")
    paths = [settings.out / f"{name}.md"]
    write_atomically(paths[0], markdown(settings, answers).encode())
    draw, whole = TABLES[settings.table].figure, settings.seeds
    ended = {row.label: settings.folder(row, 0) for row, f in answers.items() if len(f) == whole}
    if draw is not None and ended:
        paths.append(paths[0].with_suffix(".png"))
        write_atomically(paths[1], draw(ended))
    return paths


def provenance(checkpoint: Path) -> dict[str, Any]:
    """How a checkpoint was made, and how good it is; a ValueError for a file of something else."""
    with (
        expecting(f"checkpoint '{checkpoint}': expected how it was made"),
        safe_open(checkpoint, framework="pt") as file,
    ):
        return dict(json.loads(file.metadata()["provenance"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print; 0 when all rows are there, 1 when some are not, 2 for bad requests."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.tables", description=(__doc__ or "").partition("\n")[0],
        epilog="What follows -- goes to each python -m meta_train.",
    )  # fmt: skip
    add = parser.add_argument
    add("table", choices=sorted(TABLES))
    add("--only", nargs="+", default=[], metavar="LABEL",
        help="rows of these labels, or with these words in theirs")  # fmt: skip
    add("--seeds", type=int, default=2, help="how many, from 0 on")
    add("--hidden", type=int, default=0, help="channels of the graph models; 0: the paper's")
    add("--out", type=Path, default=Path("runs/tables"), metavar="FOLDER")
    add("--jobs", type=int, default=1, help="runs at the same time, of one thread each")
    args = vars(parser.parse_args(argv[:cut]))
    complete = False

    def work() -> list[str]:
        nonlocal complete
        settings = Settings(**args, extra=argv[cut + 1 :])
        answers = fill(settings)
        if not any(answers.values()):
            print("tables: no row ended, nothing written", file=sys.stderr)
            return []
        paths = write(settings, answers)
        complete = all(len(found) == settings.seeds for found in answers.values())
        return [paths[0].read_text(), f"wrote {' and '.join(map(str, paths))}"]

    return run_command("tables", work, (*ERRORS, BrokenProcessPool)) or int(not complete)


def _train(settings: Settings, run: tuple[Row, int]) -> tuple[Row, int, dict[str, Any] | str]:
    """One run: the provenance of its best checkpoint, or why there is none.

    What it prints goes to a file in its folder.
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
        except SystemExit as error:  # arguments that no command takes
            status = int(error.code or 0)
        except Exception:  # whatever it is, the other rows have nothing to do with it
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


def _figure(table: Table, found: Sequence[dict[str, Any]]) -> str:
    form = f".{table.digits}f"
    return spread([table.scale * each[table.measure] for each in found], form, form)
