"""Reports of the benchmark of optimizers: tables in Markdown, and plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median

from l2o_graph.storage.files import write_atomically
from meta_train.benchmarks.contenders import Contender
from meta_train.benchmarks.judge import (
    RULE,
    Entry,
    Standing,
    Verdict,
    format_merit,
    gain,
    over_seeds,
    over_tasks,
    standings,
    summary,
)
from meta_train.benchmarks.plots import plot_losses, plot_standings
from meta_train.benchmarks.records import Record
from meta_train.benchmarks.strangers.task import Task
from meta_train.benchmarks.training import FRACTIONS, stops


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of a comparison, in the order of the tables."""

    tasks: Sequence[Task]
    contenders: Mapping[str, Contender]  # optimizers by name
    records: Sequence[Record]  # records of whole runs
    notes: Sequence[str]  # messages about what was left out
    # Records of shorter runs, by the fraction of the steps; empty without ``anytime``.
    stopped: Mapping[float, Sequence[Record]] = field(default_factory=dict)

    def tables(self) -> dict[str, dict[str, Standing]]:
        """Compute the standings of all optimizers, by name of task and optimizer."""
        return {task.name: standings(task.merit, self.entries(task)) for task in self.tasks}

    def entries(self, task: Task) -> list[Entry]:
        """Group the records of a task by optimizer and learning rate."""
        groups: dict[tuple[str, float], list[Record]] = {}
        for r in self.records:
            if r.run.task == task.name:
                groups.setdefault((r.run.optimizer, r.run.rate), []).append(r)
        return [
            Entry(
                name,
                rate,
                {r.run.seed: r.merit for r in group},
                {r.run.seed: r.start for r in group},
                any(r.diverged and r.merit is None for r in group),
                self.contenders[name].is_learned,
            )
            for (name, rate), group in groups.items()
        ]


def write(outcome: Outcome, folder: Path) -> list[Path]:
    """Write results.md, standings.png and curves.png; return their paths."""
    tables = outcome.tables()
    labels = {name: contender.label for name, contender in outcome.contenders.items()}
    files = {
        "results.md": markdown(outcome).encode(),
        "standings.png": plot_standings(outcome.tasks, tables, labels),
        "curves.png": plot_losses(outcome.tasks, tables, outcome.records, labels),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def markdown(outcome: Outcome) -> str:
    """Format all tables."""
    seeds = sorted({r.run.seed for r in outcome.records})
    parts = [
        "# Optimizers",
        f"{len(outcome.tasks)} tasks, seeds {seeds[0]} to {seeds[-1]}, torch "
        f"{', '.join(sorted({r.torch for r in outcome.records}))}. Mean ± standard deviation over "
        "seeds; tuned rivals at the best rate of their grid, in brackets, chosen on the very "
        "figure that is shown, which favours them. AdamW, SGD, Muon and SOAP have a learning rate "
        "that decays linearly to zero. The best of a row is bold.",
        *[f"*{line}*" for line in outcome.notes],
        table(_merits(outcome)),
        "## Summary",
        "Rank: one more than the number of rivals that did better; learned optimizers are compared "
        "with the rivals, not with each other. First or level: within 0.3 points or 2 % of the "
        "best rival. Failed: diverged, or not 2 points or 10 % better than before training. Worse "
        "than default AdamW: by more than 2 points or 10 %.",
        table(_summary(outcome)),
        "## Better?",
        RULE,
        table(_verdicts(outcome)),
    ]
    per_task = _on_each_task(outcome)
    if len(per_task) > 1:
        parts += ["Task by task:", table(per_task)]
    if outcome.stopped:
        parts += [
            "## Stopped at any time",
            "Optimizers with a schedule are trained anew for each number of steps, the others only "
            "once. Median rank among rivals, and number of tasks on which first or level.",
            table(_anytime(outcome)),
        ]
    return "\n\n".join([*parts, "## All rates", table(_rates(outcome))]) + "\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a Markdown table, the first as its header."""
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _challengers(outcome: Outcome) -> list[str]:
    """Return the names of the learned optimizers, or AdamW if there are none."""
    learned = [name for name, contender in outcome.contenders.items() if contender.is_learned]
    return learned or [name for name in ("adamw",) if name in outcome.contenders]


def _merits(outcome: Outcome) -> list[list[str]]:
    rows = [["task", "merit", *(c.label for c in outcome.contenders.values())]]
    tables = outcome.tables()
    for task in outcome.tasks:
        found = tables[task.name]
        means = [s.entry.mean for s in found.values()]
        cells = []
        for name, contender in outcome.contenders.items():
            if name not in found:
                cells.append("")
                continue
            standing = found[name]
            cell = format_merit(task.merit, list(standing.entry.merits.values()))
            if all(gain(task.merit, standing.entry.mean, mean) >= 0 for mean in means):
                cell = f"**{cell}**"
            if standing.failed:
                cell += ", failed"
            cells.append(f"{cell} ({standing.entry.rate:g})" if len(contender.rates) > 1 else cell)
        rows.append([task.label, task.merit.name, *cells])
    return rows


def _summary(outcome: Outcome) -> list[list[str]]:
    rows = [["optimizer", "tasks", "median rank", "median rank, all rates", "first",
             "first or level", "failed", "worse than default AdamW"]]  # fmt: skip
    tables = outcome.tables().values()
    for name, contender in outcome.contenders.items():
        if own := [found[name] for found in tables if name in found]:
            rows.append([contender.label, *(f"{number:g}" for number in summary(own))])
    return rows


def _verdicts(outcome: Outcome) -> list[list[str]]:
    """Compare each challenger with every rival, over tasks."""
    rows = [["", "better than", "tasks won", "median difference, units", "p", "better?"]]
    tables = outcome.tables()
    for mine in _challengers(outcome):
        for other, contender in outcome.contenders.items():
            if other == mine or contender.is_learned:
                continue
            gains = [
                gain(task.merit, found[mine].entry.mean, found[other].entry.mean)
                for task in outcome.tasks
                if mine in (found := tables[task.name]) and other in found
            ]
            if gains:
                labels = [outcome.contenders[mine].label, contender.label]
                rows.append([*labels, *_cells(over_tasks(gains))])
    return rows


def _on_each_task(outcome: Outcome) -> list[list[str]]:
    """Compare each challenger with the best rival of each task, if there are enough seeds."""
    rows = [["task", "", "best rival", "seeds won", "mean difference, units", "p", "better?"]]
    tables = outcome.tables()
    for task in outcome.tasks:
        found = tables[task.name]
        for mine in _challengers(outcome):
            rivals = [n for n, s in found.items() if n != mine and not s.entry.is_learned]
            if mine not in found or not rivals:
                continue
            other = min(rivals, key=lambda n: (found[n].rank, found[n].behind))
            ours, theirs = found[mine].entry.merits, found[other].entry.merits
            gains = [gain(task.merit, ours[s], theirs[s]) for s in ours if s in theirs]
            if gains and (verdict := over_seeds(gains)).p is not None:
                labels = [outcome.contenders[name].label for name in (mine, other)]
                rows.append([task.label, *labels, *_cells(verdict)])
    return rows


def _cells(verdict: Verdict) -> list[str]:
    p = "too few" if verdict.p is None else f"{verdict.p:.2g}"
    won = f"{verdict.wins} of {verdict.count}"
    return [won, f"{verdict.gain:+.2g}", p, verdict.better]


def _anytime(outcome: Outcome) -> list[list[str]]:
    rows = [["optimizer", *(f"{share:g} of the run" for share in outcome.stopped)]]
    tables = [replace(outcome, records=r).tables().values() for r in outcome.stopped.values()]
    for name, contender in outcome.contenders.items():
        row = [contender.label]
        for found in tables:
            own = [standing[name] for standing in found if name in standing]
            level = f"{sum(s.level for s in own)} of {len(own)}"
            row.append(f"{median(s.rank for s in own):g}, {level}" if own else "")
        rows.append(row)
    return rows


def _rates(outcome: Outcome) -> list[list[str]]:
    rows = [["task", "optimizer", "rate", "merit", "at the start"]]
    for task in outcome.tasks:
        for e in outcome.entries(task):
            contender = outcome.contenders[e.optimizer]
            if len(contender.rates) > 1:
                merit = format_merit(task.merit, list(e.merits.values()))
                start = format_merit(task.merit, [fmean(e.starts.values())])
                rows.append([task.label, contender.label, f"{e.rate:g}", merit, start])
    return rows


def stopped_early(tasks: Sequence[Task], records: Sequence[Record]) -> dict[float, list[Record]]:
    """Sort records by the fraction of the steps; a whole run also gives its shorter parts."""
    answer: dict[float, list[Record]] = {share: [] for share in FRACTIONS}
    for task in tasks:
        own = [r for r in records if r.run.task == task.name]
        for share, steps in zip(FRACTIONS, stops(task.steps), strict=True):
            whole = (r for r in own if r.run.steps in (steps, task.steps))
            answer[share] += [r.stopped(steps) for r in whole if steps in r.merits]
    return answer
