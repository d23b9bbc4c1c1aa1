"""Who is better: the rules, on plain numbers.

Merits of a task are compared in units that make tasks comparable: 0.3 points of accuracy, or 2 %
of a loss, is one unit, and so is what "level" means. "Clearly" is 2 points, or 10 % of a loss.
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
FEWEST_TASKS, FEWEST_SEEDS = 6, 3  # with fewer, no test can be significant, or be trusted
WORST = 1000.0  # units; what a run without a number is behind by
DEFAULT = "adamw-default"  # what nobody should be clearly worse than

RULE = (
    "One optimizer is *better* than another over the tasks if a two-sided Wilcoxon signed-rank "
    f"test over the tasks' differences (in units of {LEVEL_POINTS:g} points of accuracy or "
    f"{100 * LEVEL_SHARE:g} % of a loss, means over seeds) has p < {SIGNIFICANT:g}; on one task, "
    f"if a paired t test over at least {FEWEST_SEEDS} seeds has, and the mean difference is more "
    "than one unit."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """An optimizer at one rate on one task.

    ``merits`` are by seed, None where there was no number, and ``starts`` those before training;
    ``diverged`` is whether any seed did.
    """

    optimizer: str
    rate: float
    merits: Mapping[int, float | None]
    starts: Mapping[int, float]
    diverged: bool = False
    is_learned: bool = False

    @property
    def mean(self) -> float | None:
        """Over seeds; None where one has no number."""
        values = list(self.merits.values())
        numbers = [value for value in values if value is not None]
        return fmean(numbers) if len(numbers) == len(values) else None


def gain(merit: Merit, mine: float | None, other: float | None) -> float:
    """How much better mine is than the other, in units; negative if it is worse."""
    if mine is None or other is None:
        return WORST * ((mine is not None) - (other is not None))
    if merit.higher:
        return (mine - other) / LEVEL_POINTS
    return max(-WORST, min(WORST, math.log(other / mine) / math.log1p(LEVEL_SHARE)))


def clearly_worse(merit: Merit, mine: float | None, other: float | None) -> bool:
    """By more than 2 points of accuracy, or a loss more than 10 % higher."""
    if mine is None or other is None:
        return mine is None and other is not None
    if merit.higher:
        return mine < other - CLEAR_POINTS
    return mine > (1 + CLEAR_SHARE) * other


def failed(merit: Merit, entry: Entry) -> bool:
    """Whether a seed diverged, or the mean is not clearly better than before training."""
    if entry.diverged or entry.mean is None:
        return True
    return not clearly_worse(merit, fmean(entry.starts.values()), entry.mean)


def at_best_rates(merit: Merit, entries: Sequence[Entry]) -> dict[str, Entry]:
    """By optimizer, the entry with the best mean of those with the most seeds; the first of equals.

    Its rate is the best one.
    """
    sign = 1.0 if merit.higher else -1.0

    def goodness(entry: Entry) -> tuple[int, float]:
        mean = -math.inf if entry.mean is None else sign * entry.mean
        return len(entry.merits), mean

    names = dict.fromkeys(e.optimizer for e in entries)
    return {n: max((e for e in entries if e.optimizer == n), key=goodness) for n in names}


def rank(merit: Merit, entry: Entry, others: Sequence[Entry]) -> int:
    """One more than there are rivals, other optimizers than this and not learned, that did better.

    Learned ones are each compared with the rivals, not with each other.
    """
    rivals = [e for e in others if not e.is_learned and e.optimizer != entry.optimizer]
    return 1 + sum(gain(merit, e.mean, entry.mean) > 0 for e in rivals)


@dataclass(frozen=True, slots=True)
class Standing:
    """How an optimizer, at its best rate, did on a task."""

    entry: Entry
    rank: int  # among rivals at their best rates
    rank_of_all: int  # among all rates of all rivals
    behind: float  # units that the best rival, other than itself, is better; negative if worse
    level: bool  # first or at most one unit behind
    failed: bool
    worse_than_default: bool  # clearly, than default AdamW; not where that was not run


def standings(merit: Merit, entries: Sequence[Entry]) -> dict[str, Standing]:
    """Of all optimizers on a task, by name."""
    chosen = at_best_rates(merit, entries)
    default = chosen.get(DEFAULT)
    answer: dict[str, Standing] = {}
    for name, entry in chosen.items():
        rivals = [e for n, e in chosen.items() if n != name and not e.is_learned]
        behind = max((gain(merit, e.mean, entry.mean) for e in rivals), default=0.0)
        lost = failed(merit, entry)
        answer[name] = Standing(
            entry,
            rank=rank(merit, entry, list(chosen.values())),
            rank_of_all=rank(merit, entry, entries),
            behind=behind,
            level=behind <= 1.0 + 1e-9 and not lost,
            failed=lost,
            worse_than_default=default is not None
            and clearly_worse(merit, entry.mean, default.mean),
        )
    return answer


def summary(own: Sequence[Standing]) -> tuple[int | float, ...]:
    """Sum up an optimizer's standings over tasks, in the order of the report's columns.

    Number of tasks; median of the rank and of the rank among all rates; numbers of tasks on which
    it was the first, level, failed and worse than default AdamW.
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
    """One optimizer against another, over tasks or over seeds."""

    count: int  # of tasks or seeds
    wins: int
    gain: float  # median over tasks, or mean over seeds, in units
    p: float | None  # of the test; None where there are too few
    better: str  # "yes", "no" for worse, or "not significant"


def over_tasks(gains: Sequence[float]) -> Verdict:
    """Wilcoxon's signed-rank test over the tasks' differences, two-sided."""
    from scipy.stats import rankdata, wilcoxon

    moved = [g for g in gains if g != 0]
    found: Any = wilcoxon(moved) if len(moved) >= FEWEST_TASKS else None  # scipy has no types of it
    p = None if found is None else float(found.pvalue)
    ranks = rankdata([abs(g) for g in moved])
    balance = sum(math.copysign(r, g) for r, g in zip(ranks, moved, strict=True))
    return _verdict(gains, median(gains), p, balance)


def paired_p(differences: Sequence[float]) -> float:
    """Of a paired t test against 0, two-sided; 1 where nothing differs or can be told."""
    from scipy.stats import t

    mean, count = fmean(differences), len(differences)
    if count < 2 or not mean:
        return 1.0
    error = stdev(differences) / math.sqrt(count)
    return 2 * float(t.sf(abs(mean) / error, count - 1)) if error else 0.0  # without any spread


def over_seeds(gains: Sequence[float]) -> Verdict:
    """A paired t test over the seeds of one task, two-sided."""
    mean = fmean(gains)
    p = paired_p(gains) if len(gains) >= FEWEST_SEEDS else None
    return _verdict(gains, mean, p, mean if abs(mean) > 1 else 0.0)


def _verdict(gains: Sequence[float], middle: float, p: float | None, balance: float) -> Verdict:
    """A verdict whose direction is the sign of ``balance``; with 0 there is none."""
    better = "not significant"
    if p is not None and p < SIGNIFICANT and balance:
        better = "yes" if balance > 0 else "no"
    return Verdict(len(gains), sum(g > 0 for g in gains), middle, p, better)


def text(merit: Merit, values: Sequence[float | None]) -> str:
    """Mean and standard deviation of a figure of merit, or "diverged"."""
    numbers = [value for value in values if value is not None]
    if not values or len(numbers) < len(values):
        return "diverged"
    return spread(numbers, *((".1f", ".1f") if merit.higher else (".3g", ".1g")))


def spread(values: Sequence[float], mean: str, deviation: str) -> str:
    """Mean and, of more than one value, standard deviation, each in a format."""
    told = f" ± {stdev(values):{deviation}}" if len(values) > 1 else ""
    return f"{fmean(values):{mean}}{told}"
