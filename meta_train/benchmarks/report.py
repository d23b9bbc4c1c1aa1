"""Runs -> tables and curves."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from l2o_graph.storage.files import write_atomically
from meta_train.benchmarks.baselines import PUBLISHED, base_of, contenders
from meta_train.benchmarks.plots import Curve, Panel, plot_curves
from meta_train.benchmarks.runs import FINAL, THINNING, Record, Settings


def report(settings: Settings, records: Sequence[Record]) -> list[Path]:
    """Write results.md and curves.png of these records; returns their paths."""
    table, curves = settings.out / "results.md", settings.out / "curves.png"
    write_atomically(table, markdown(records).encode())
    write_atomically(curves, plot_curves([_panel(task, rs) for task, rs in _by_task(records)]))
    return [table, curves]


def markdown(records: Sequence[Record]) -> str:
    """Summary at each optimizer's best rate beside the paper's, then every rate of every task."""
    labels = _labels(records)
    by_task = _by_task(records)
    best = {task: best_rates(task_records) for task, task_records in by_task}
    first = records[0]
    seeds = sorted({r.run.seed for r in records})
    columns = [h for task in best for h in (task, *(["paper"] if task in PUBLISHED else []))]
    lines = [
        f"Test accuracy in % after {first.run.steps:,} steps, mean ± standard deviation over "
        f"seeds {seeds[0]} to {seeds[-1]}; in brackets the best rate of the grid.",
        "",
        "| optimizer | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in dict.fromkeys(r.run.optimizer for r in records):
        cells = []
        for task in best:
            cells.append(f"{_accuracy(best[task][name])} ({_rate(best[task][name])})")
            if task in PUBLISHED:
                known = PUBLISHED[task].get(base_of(name))
                cells.append(f"{known[0]:.2f} ± {known[1]:.2f}" if known else "")
        lines.append(f"| {labels[name]} | " + " | ".join(cells) + " |")
    for task, task_records in by_task:
        lines += [
            "",
            f"### {task} ({task_records[0].data})",
            "",
            f"| optimizer | rate | accuracy, % | loss, last {FINAL} steps | ms per training step "
            "| of which update |",
            "|---|---|---|---|---|---|",
        ]
        for (name, _), group in _by_rate(task_records).items():
            star = " (best)" if len(_rates(task_records, name)) > 1 else ""
            chosen = star if group == best[task][name] else ""
            lines.append(
                f"| {labels[name]} | {_rate(group)}{chosen} | {_accuracy(group)} | {_loss(group)} "
                f"| {1e3 * median(r.step_seconds for r in group):.1f} "
                f"| {1e3 * median(r.update_seconds for r in group):.1f} |"
            )
    checkpoints = sorted({r.run.checkpoint for r in records if r.run.checkpoint})
    versions = sorted({f"torch {r.torch}; {r.machine}" for r in records})
    if checkpoints:
        lines += ["", f"Learned: {', '.join(checkpoints)}."]
    lines += ["", f"Measured {first.date[:10]} with {' and '.join(versions)}.", ""]
    return "\n".join(lines)


def _by_task(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    tasks = dict.fromkeys(r.run.task for r in records)
    return [(task, [r for r in records if r.run.task == task]) for task in tasks]


def _by_rate(records: Sequence[Record]) -> dict[tuple[str, float], list[Record]]:
    """Records by optimizer and rate; seeds together."""
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        groups.setdefault((record.run.optimizer, record.run.rate), []).append(record)
    return groups


def _rates(records: Sequence[Record], optimizer: str) -> set[float]:
    return {r.run.rate for r in records if r.run.optimizer == optimizer}


def best_rates(records: Sequence[Record]) -> dict[str, list[Record]]:
    """By optimizer, the records at its best rate."""
    best: dict[str, list[Record]] = {}
    for (name, _), group in _by_rate(records).items():
        # A rate that only took part in the tuning has fewer seeds.
        if name not in best or _standing(group) > _standing(best[name]):
            best[name] = group
    return best


def _standing(records: Sequence[Record]) -> tuple[int, float]:
    return len(records), fmean(r.accuracy for r in records)


def _accuracy(records: Sequence[Record]) -> str:
    text = spread([100 * r.accuracy for r in records], 2)
    diverged = sum(r.diverged for r in records)
    return text + (f", {diverged} of {len(records)} diverged" if diverged else "")


def _loss(records: Sequence[Record]) -> str:
    losses = [r.final_loss for r in records if r.final_loss is not None]
    return spread(losses, 3) if losses else "diverged"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of more than one value, standard deviation."""
    text = f"{fmean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _rate(records: Sequence[Record]) -> str:
    return f"{records[0].run.rate:g}"


def line_of(record: Record) -> str:
    """A record on a line."""
    run = record.run
    return (
        f"{run.task} {run.optimizer} {run.rate:g} seed {run.seed}: {record.accuracy:.2%}, loss "
        f"{_loss([record])}, {1e3 * record.step_seconds:.1f} ms a step"
    )


def _labels(records: Sequence[Record]) -> dict[str, str]:
    learned = {base_of(r.run.optimizer): r.run.checkpoint for r in records if r.run.checkpoint}
    return {name: contender.label for name, contender in contenders(learned).items()}


def _panel(task: str, records: Sequence[Record]) -> Panel:
    labels = _labels(records)
    curves = []
    for name, group in best_rates(records).items():
        label = labels[name] if group[0].run.checkpoint else f"{labels[name]}, {_rate(group)}"
        accuracies = [r.accuracies for r in group if r.accuracies]
        losses = [r.curve for r in group if r.curve]  # of none, where the first was no number
        if losses:
            curves.append(Curve(name, label, losses, THINNING, accuracies))
    return Panel(f"{task} ({records[0].data})", curves)
