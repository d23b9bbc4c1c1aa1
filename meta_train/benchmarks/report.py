"""The outcome as Markdown, as JSON and as pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from l2o_graph.storage.files import write_atomically
from meta_train.benchmarks.contenders import Contender
from meta_train.benchmarks.judge import (
    RULE,
    Entry,
    Standing,
    Verdict,
    entries_of,
    gain,
    over_seeds,
    over_tasks,
    standings,
    summaries,
    text,
)
from meta_train.benchmarks.plots import curves, dots
from meta_train.benchmarks.records import Record
from meta_train.benchmarks.strangers.task import Task
from meta_train.benchmarks.training import FRACTIONS, stops


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that is reported, in the order of the tables."""

    tasks: Sequence[Task]
    contenders: Mapping[str, Contender]  # by name
    records: Sequence[Record]  # of whole runs
    stopped: Mapping[float, Sequence[Record]]  # by the fraction of a run, if that was asked for
    notes: Sequence[str]  # about what was left out

    def tables(self, records: Sequence[Record]) -> dict[str, dict[str, Standing]]:
        """Standings of each task, by its name."""
        return {
            task.name: standings(task.merit, self.entries(task, records)) for task in self.tasks
        }

    def entries(self, task: Task, records: Sequence[Record]) -> list[Entry]:
        """A task's entries, one for each optimizer and rate."""
        own = [r for r in records if r.run.task == task.name]
        learned = {name: contender.is_learned for name, contender in self.contenders.items()}
        return entries_of(own, learned)


def write(outcome: Outcome, folder: Path) -> list[Path]:
    """Write results.md, standings.png and curves.png; returns their paths."""
    tables = outcome.tables(outcome.records)
    labels = {name: contender.label for name, contender in outcome.contenders.items()}
    files = {
        "results.md": markdown(outcome).encode(),
        "standings.png": dots(outcome.tasks, tables, labels),
        "curves.png": curves(outcome.tasks, tables, outcome.records, labels),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def markdown(outcome: Outcome) -> str:
    """All tables."""
    seeds = sorted({r.run.seed for r in outcome.records})
    parts = [
        "# Optimizers",
        f"{len(outcome.tasks)} tasks, seeds {seeds[0]} to {seeds[-1]}, torch "
        f"{', '.join(sorted({r.torch for r in outcome.records}))}. Mean ± standard deviation over "
        "seeds; tuned rivals at the best rate of their grid, in brackets, chosen on the very "
        "figure that is shown, which favours them. AdamW, SGD, Muon and SOAP decay linearly to "
        "zero. The best of a row is bold.",
        *[f"*{line}*" for line in outcome.notes],
        table(_merits(outcome)),
        "## Summary",
        "Rank: one more than there are rivals that did better; learned ones are each compared "
        "with the rivals, not with each other. First or level: within 0.3 points or 2 % of the "
        "best rival. Failed: diverged, or not 2 points or 10 % better than before training. Worse "
        "than AdamW as it comes: by more than 2 points or 10 %.",
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
            "Every schedule is planned anew for each stop; what knows no end is one run. Median "
            "rank among rivals, and how often first or level.",
            table(_anytime(outcome)),
        ]
    parts += [
        "## Cost of a step",
        "Median time of the update over median time of a forward and backward pass; in brackets "
        "with the mean of the update, which counts the steps that renew a basis.",
        table(_costs(outcome)),
        "## All rates",
        table(_rates(outcome)),
    ]
    return "\n\n".join(parts) + "\n"


def verdicts(outcome: Outcome) -> dict[tuple[str, str], Verdict]:
    """Each learned contender, or AdamW where there is none, against every rival, over tasks."""
    tables = outcome.tables(outcome.records)
    answer: dict[tuple[str, str], Verdict] = {}
    for mine in _challengers(outcome):
        for other, contender in outcome.contenders.items():
            if other == mine or contender.is_learned:
                continue
            gains = [
                gain(task.merit, table[mine].entry.mean, table[other].entry.mean)
                for task in outcome.tasks
                if mine in (table := tables[task.name]) and other in table
            ]
            if gains:
                answer[mine, other] = over_tasks(gains)
    return answer


def passes(outcome: Outcome, task: Task, name: str) -> tuple[float | None, float | None]:
    """Median and mean cost of a step, in forward and backward passes."""
    own = [r for r in outcome.records if (r.run.task, r.run.optimizer) == (task.name, name)]
    own = [r for r in own if r.pass_seconds]
    if not own:
        return None, None
    return (
        median(r.update_seconds / r.pass_seconds for r in own),
        median(r.update_seconds_mean / r.pass_seconds for r in own),
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of more than one value, standard deviation."""
    text = f"{fmean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _challengers(outcome: Outcome) -> list[str]:
    learned = [name for name, contender in outcome.contenders.items() if contender.is_learned]
    return learned or [name for name in ("adamw",) if name in outcome.contenders]


def _merits(outcome: Outcome) -> list[list[str]]:
    tables = outcome.tables(outcome.records)
    rows = [["task", "merit", *(c.label for c in outcome.contenders.values())]]
    for task in outcome.tasks:
        table = tables[task.name]
        means = [s.entry.mean for s in table.values()]
        cells = []
        for name, contender in outcome.contenders.items():
            if name not in table:
                cells.append("")
                continue
            standing = table[name]
            cell = text(task.merit, list(standing.entry.merits.values()))
            if all(gain(task.merit, standing.entry.mean, mean) >= 0 for mean in means):
                cell = f"**{cell}**"
            if standing.failed:
                cell += ", failed"
            cells.append(f"{cell} ({standing.entry.rate:g})" if len(contender.rates) > 1 else cell)
        rows.append([task.label, task.merit.name, *cells])
    return rows


def _summary(outcome: Outcome) -> list[list[str]]:
    rows = [["optimizer", "tasks", "median rank", "median rank, every rate a rival", "first",
             "first or level", "failed", "worse than AdamW as it comes"]]  # fmt: skip
    found = summaries(outcome.tables(outcome.records))
    for name, contender in outcome.contenders.items():
        if name in found:
            rows.append([contender.label, *(f"{number:g}" for number in astuple(found[name]))])
    return rows


def _verdicts(outcome: Outcome) -> list[list[str]]:
    rows = [["", "better than", "tasks won", "median difference, units", "p", "better?"]]
    for (mine, other), verdict in verdicts(outcome).items():
        labels = [outcome.contenders[name].label for name in (mine, other)]
        rows.append([*labels, *_cells(verdict)])
    return rows


def _on_each_task(outcome: Outcome) -> list[list[str]]:
    """Against the best rival of each task, where there are seeds enough to tell."""
    rows = [["task", "", "best rival", "seeds won", "mean difference, units", "p", "better?"]]
    for task in outcome.tasks:
        table = standings(task.merit, outcome.entries(task, outcome.records))
        rivals = {n: s for n, s in table.items() if not s.entry.is_learned}
        for mine in _challengers(outcome):
            others = [n for n in rivals if n != mine]
            if mine not in table or not others:
                continue
            other = min(others, key=lambda n: (rivals[n].rank, rivals[n].behind))
            ours, theirs = table[mine].entry.merits, rivals[other].entry.merits
            gains = [gain(task.merit, ours[s], theirs[s]) for s in ours if s in theirs]
            verdict = over_seeds(gains) if gains else None
            if verdict is None or verdict.p is None:
                continue
            labels = [outcome.contenders[name].label for name in (mine, other)]
            rows.append([task.label, *labels, *_cells(verdict)])
    return rows


def _cells(verdict: Verdict) -> list[str]:
    p = "too few" if verdict.p is None else f"{verdict.p:.2g}"
    won = f"{verdict.wins} of {verdict.count}"
    return [won, f"{verdict.gain:+.2g}", p, verdict.better]


def _anytime(outcome: Outcome) -> list[list[str]]:
    shares = list(outcome.stopped)
    rows = [["optimizer", *(f"{share:g} of the run" for share in shares)]]
    found = {share: summaries(outcome.tables(outcome.stopped[share])) for share in shares}
    for name, contender in outcome.contenders.items():
        cells = [
            f"{s.median_rank:g}, {s.level} of {s.tasks}" if (s := found[share].get(name)) else ""
            for share in shares
        ]
        rows.append([contender.label, *cells])
    return rows


def _costs(outcome: Outcome) -> list[list[str]]:
    rows = [["task", "pass, ms", *(c.label for c in outcome.contenders.values())]]
    for task in outcome.tasks:
        own = [r.pass_seconds for r in outcome.records if r.run.task == task.name]
        cells = [passes(outcome, task, name) for name in outcome.contenders]
        rows.append([
            task.label, f"{1e3 * median(own):.1f}" if own else "",
            *("" if m is None else f"{m:.2f} ({mean:.2f})" for m, mean in cells),
        ])  # fmt: skip
    return rows


def _rates(outcome: Outcome) -> list[list[str]]:
    rows = [["task", "optimizer", "rate", "merit", "at the start"]]
    for task in outcome.tasks:
        for e in outcome.entries(task, outcome.records):
            if len(outcome.contenders[e.optimizer].rates) > 1:
                merit = text(task.merit, list(e.merits.values()))
                start = text(task.merit, [fmean(e.starts.values())])
                label = outcome.contenders[e.optimizer].label
                rows.append([task.label, label, f"{e.rate:g}", merit, start])
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown, the first as the head."""
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def stopped_early(tasks: Sequence[Task], records: Sequence[Record]) -> dict[float, list[Record]]:
    """Records by the fraction of the run at which they stopped, those of one long run too."""
    answer: dict[float, list[Record]] = {}
    for i, share in enumerate(FRACTIONS):
        answer[share] = []
        for task in tasks:
            steps = stops(task.steps)[i]
            own = [r for r in records if r.run.task == task.name]
            answer[share] += [
                r if r.run.steps == steps else r.stopped(steps)
                for r in own
                if r.run.steps == steps or (r.run.steps == task.steps and steps in r.merits)
            ]
    return answer
