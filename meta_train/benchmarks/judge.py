"""Comparison of optimizers: ranks on each task, and tests of significance.

Differences are in units that make tasks comparable: one unit is 0.3 points of accuracy or 2 % of a
loss. Optimizers within one unit of each other are level. "Clearly" worse is 2 points or 10 %.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from meta_train.benchmarks.strangers.task import Merit

LEVEL_POINTS, LEVEL_SHARE = 0.3, 0.02
CLEAR_POINTS, CLEAR_SHARE = 2.0, 0.10
SIGNIFICANT = 0.05
# With fewer tasks the Wilcoxon test cannot be significant; with fewer seeds a t-test is unreliable.
FEWEST_TASKS, FEWEST_SEEDS = 6, 3
WORST = 1000.0  # largest difference in units, also that of a diverged run
DEFAULT = "adamw-default"  # baseline that no optimizer should be clearly worse than

RULE = (
    "One optimizer is *better* than another over the tasks if a two-sided Wilcoxon signed-rank "
    f"test over the tasks' differences (in units of {LEVEL_POINTS:g} points of accuracy or "
    f"{100 * LEVEL_SHARE:g} % of a loss, means over seeds) has p < {SIGNIFICANT:g}. On one task, "
    f"it is better if a paired t-test over at least {FEWEST_SEEDS} seeds has p < {SIGNIFICANT:g} "
    "and the mean difference is more than one unit."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """Results of an optimizer with one learning rate on one task."""

    optimizer: str
    rate: float
    merits: Mapping[int, float | None]  # figure of merit by seed; None if diverged
    starts: Mapping[int, float]  # figure of merit before training, by seed
    diverged: bool = False  # whether a seed diverged
    is_learned: bool = False

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None if a seed diverged."""
        values = list(self.merits.values())
        numbers = [value for value in values if value is not None]
        return fmean(numbers) if len(numbers) == len(values) else None


def gain(merit: Merit, mine: float | None, other: float | None) -> float:
    """Compute by how many units ``mine`` is better than ``other``; negative if it is worse."""
    if mine is None or other is None:
        return WORST * ((mine is not None) - (other is not None))
    if merit.higher:
        return (mine - other) / LEVEL_POINTS
    return max(-WORST, min(WORST, math.log(other / mine) / math.log1p(LEVEL_SHARE)))


def clearly_worse(merit: Merit, mine: float | None, other: float | None) -> bool:
    """Return whether ``mine`` is worse by more than 2 points of accuracy, or 10 % of a loss."""
    if mine is None or other is None:
        return mine is None and other is not None
    if merit.higher:
        return mine < other - CLEAR_POINTS
    return mine > (1 + CLEAR_SHARE) * other


def failed(merit: Merit, entry: Entry) -> bool:
    """Return whether a seed diverged, or the mean is not clearly better than before training."""
    if entry.diverged or entry.mean is None:
        return True
    return not clearly_worse(merit, fmean(entry.starts.values()), entry.mean)


def at_best_rates(merit: Merit, entries: Sequence[Entry]) -> dict[str, Entry]:
    """Choose the best learning rate of each optimizer.

    It is the one with the best mean, among those with the most seeds.

    Returns:
        Entry of each optimizer by name.
    """
    sign = 1.0 if merit.higher else -1.0

    def goodness(entry: Entry) -> tuple[int, float]:
        mean = -math.inf if entry.mean is None else sign * entry.mean
        return len(entry.merits), mean

    names = dict.fromkeys(e.optimizer for e in entries)
    return {n: max((e for e in entries if e.optimizer == n), key=goodness) for n in names}


@dataclass(frozen=True, slots=True)
class Standing:
    """Standing of an optimizer, at its best learning rate, on a task.

    Rivals are all other optimizers that are not learned.
    """

    entry: Entry
    rank: int  # one plus the number of rivals that did better
    rank_of_all: int  # the same, where each learning rate of a rival counts
    behind: float  # units that the best rival is better; negative if it is worse
    level: bool  # whether it is first or at most one unit behind
    failed: bool
    worse_than_default: bool  # whether it is clearly worse than default AdamW, if that was run


def standings(merit: Merit, entries: Sequence[Entry]) -> dict[str, Standing]:
    """Compute the standings of all optimizers on a task, by name."""
    best = at_best_rates(merit, entries)
    default = best.get(DEFAULT)
    found: dict[str, Standing] = {}
    for name, entry in best.items():
        among_best, among_all = (
            [
                gain(merit, e.mean, entry.mean)
                for e in group
                if e.optimizer != name and not e.is_learned
            ]
            for group in (best.values(), entries)
        )
        behind = max(among_best, default=0.0)
        lost = failed(merit, entry)
        found[name] = Standing(
            entry,
            rank=1 + sum(g > 0 for g in among_best),
            rank_of_all=1 + sum(g > 0 for g in among_all),
            behind=behind,
            level=behind <= 1.0 + 1e-9 and not lost,
            failed=lost,
            worse_than_default=default is not None
            and clearly_worse(merit, entry.mean, default.mean),
        )
    return found


def summary(own: Sequence[Standing]) -> tuple[int | float, ...]:
    """Summarise the standings of an optimizer over tasks, in the order of the report's columns.

    Returns:
        Number of tasks; median rank, and median rank among all learning rates; numbers of tasks on
        which it was first, level, failed and worse than default AdamW.
    """
    return (
        len(own),
        median(s.rank for s in own),
        median(s.rank_of_all for s in own),
        sum(s.rank == 1 and not s.failed for s in own),
        sum(s.level for s in own),
        sum(s.failed for s in own),
        sum(s.worse_than_default for s in own),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Comparison of two optimizers over tasks or over seeds."""

    count: int  # number of tasks or seeds
    wins: int  # number of tasks or seeds on which the first is better
    gain: float  # median over tasks, or mean over seeds, in units
    p: float | None  # p-value of the test; None if there are too few
    better: str  # "yes", "no" for worse, or "not significant"


def over_tasks(gains: Sequence[float]) -> Verdict:
    """Test differences over tasks by a two-sided Wilcoxon signed-rank test."""
    from scipy.stats import rankdata, wilcoxon

    moved = [g for g in gains if g != 0]
    found: Any = wilcoxon(moved) if len(moved) >= FEWEST_TASKS else None  # scipy has no types of it
    p = None if found is None else float(found.pvalue)
    ranks = rankdata([abs(g) for g in moved])
    balance = sum(math.copysign(r, g) for r, g in zip(ranks, moved, strict=True))
    return _verdict(gains, median(gains), p, balance)


def over_seeds(gains: Sequence[float]) -> Verdict:
    """Test differences over the seeds of one task by a two-sided paired t-test."""
    mean = fmean(gains)
    p = t_test(gains) if len(gains) >= FEWEST_SEEDS else None
    return _verdict(gains, mean, p, mean if abs(mean) > 1 else 0.0)


def t_test(differences: Sequence[float]) -> float:
    """Compute the p-value of a two-sided paired t-test; 1 for fewer than two differences."""
    from scipy.stats import t

    mean, count = fmean(differences), len(differences)
    if count < 2 or not mean:
        return 1.0
    error = stdev(differences) / math.sqrt(count)
    return 2 * float(t.sf(abs(mean) / error, count - 1)) if error else 0.0


def _verdict(gains: Sequence[float], middle: float, p: float | None, balance: float) -> Verdict:
    """Create a verdict whose direction, if significant, is the sign of ``balance``."""
    better = "not significant"
    if p is not None and p < SIGNIFICANT and balance:
        better = "yes" if balance > 0 else "no"
    return Verdict(len(gains), sum(g > 0 for g in gains), middle, p, better)


def format_merit(merit: Merit, values: Sequence[float | None]) -> str:
    """Format the mean and standard deviation of figures of merit; "diverged" if one is None."""
    numbers = [value for value in values if value is not None]
    if not values or len(numbers) < len(values):
        return "diverged"
    return format_mean(numbers, *((".1f", ".1f") if merit.higher else (".3g", ".1g")))


def format_mean(values: Sequence[float], mean: str, deviation: str) -> str:
    """Format the mean and, for more than one value, the standard deviation."""
    told = f" ± {stdev(values):{deviation}}" if len(values) > 1 else ""
    return f"{fmean(values):{mean}}{told}"
