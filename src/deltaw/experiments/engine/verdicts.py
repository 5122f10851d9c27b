"""What a tuned record says: chosen rates, reported means, paired differences and a verdict for each pair of rows.

Everything is over the reporting seeds, given the chosen rates and the examples: other examples may differ by more, which is
`two_level.py`'s. Runs of one seed share head and order of the examples, so that rows are compared by the differences within
seeds, d (n,).

- *Interval.* Student's t, of a mean or of d.
- *Simultaneous interval.* The same with the 95 % quantile of max |t| over the family's pairs instead of t's: all of them
  cover at once. By parametric bootstrap: n normal rows with the covariance of the d, taken around their means.
- *Separated.* The two-sided p of d's t-test, corrected by Holm, is at most 0.05.
- *Equivalent.* Of two one-sided tests against −margin and margin the larger p, corrected by Holm, is at most 0.05.
- *Verdict.* "equivalent" if it is, whether separated or not: the margin says which difference does not matter. Else "better"
  or "worse" if separated, else "not separable". "stopped" if a reporting run was, or none could be made.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from .tuning import TUNING, choices, measure_of

LEVEL = 0.95
DRAWS = 10_000  # of the bootstrap


# ---------------------------------------------------------------------------------------------------------------------
# From a record, as `tuning.search` makes it, with a column "task"


def rates(runs: pd.DataFrame) -> dict[str, float | None]:
    """The chosen rate by row, of one task's runs."""
    return choices(runs, measure_of(runs["task"].iloc[0]))


def curves(table: pd.DataFrame, part: str = "tune") -> pd.DataFrame:
    """The measure on `part` against the rate: mean, least and largest over the tuning seeds, and how many were stopped."""
    found = []
    for task, runs in table[table["phase"].isin(TUNING)].groupby("task", sort=False):
        groups = runs.groupby(["row", "rate"], sort=False)
        values = groups[f"{part}/{measure_of(task)}"].agg(["mean", "min", "max"])
        stopped = groups["stopped"].agg(lambda why: int((why != "").sum()))
        found.append(values.assign(stopped=stopped, task=task).reset_index())
    return pd.concat(found)[["task", "row", "rate", "mean", "min", "max", "stopped"]].sort_values(
        ["task", "row", "rate"]).reset_index(drop=True)


def by_seed(runs: pd.DataFrame, column: str, at: str | None = None) -> pd.DataFrame:
    """A column's values by reporting seed and row, each at its own rate; given `at`, all at that row's. (seeds, rows)

    NaN where a run was stopped. A row that has no such runs is left out.
    """
    kept = reporting(runs, at)
    order = [row for row in runs["row"].unique() if row in set(kept["row"])]  # as in the record
    return kept.pivot(index="seed", columns="row", values=column).astype(float)[order]


def reporting(runs: pd.DataFrame, at: str | None = None) -> pd.DataFrame:
    """One task's reporting runs, of each row at its own rate; given `at`, at that row's."""
    chosen = rates(runs)
    rate = runs["row"].map(chosen if at is None else dict.fromkeys(chosen, chosen[at])).astype(float)
    return runs[~runs["phase"].isin(TUNING) & (runs["rate"] == rate)]


def reported(table: pd.DataFrame) -> pd.DataFrame:
    """Of each task and row: the chosen rate, whether it is at the edge of those tried, and the mean on "report".

    Columns: task, row, scale, rate, at_edge, report, low, high, half_width, seeds, loss (on "report"), stopped (runs).
    """
    found = []
    for task, runs in table.groupby("task", sort=False):
        values, losses = (by_seed(runs, f"report/{name}") for name in (measure_of(task), "loss"))
        for row, rate in rates(runs).items():
            each = values[row].to_numpy() if row in values else np.array([])
            low, mean, high = student(each)
            found.append({"task": task, "row": row, "scale": runs.loc[runs["row"] == row, "scale"].iloc[0], "rate": rate,
                          "at_edge": at_edge(runs, row, rate), "report": mean, "low": low,
                          "high": high, "half_width": (high - low) / 2, "seeds": len(each),
                          "loss": losses[row].mean(skipna=False) if row in losses else np.nan,
                          "stopped": int(np.isnan(each).sum())})
    return pd.DataFrame(found)


def at_edge(runs: pd.DataFrame, row: str, rate: float | None) -> bool:
    """Is the rate the lowest or highest that one task's row was tried at? Then the row counts as not tuned."""
    tried = runs.loc[(runs["row"] == row) & runs["phase"].isin(TUNING), "rate"]
    return rate is None or bool(rate in (tried.min(), tried.max()))


def against(table: pd.DataFrame, reference: str, margin: float, at: str | None = None) -> pd.DataFrame:
    """Every other row − `reference` on "report"; a task's pairs are a family. See `between`."""
    rows = [row for row in table["row"].unique() if row != reference]
    return between(table, [(row, reference) for row in rows], margin, at)


def between(table: pd.DataFrame, pairs: Sequence[tuple[str, str]], margin: float, at: str | None = None) -> pd.DataFrame:
    """The pairs' differences of the measure on "report" in each task: `compare`'s columns behind task.

    Args:
        table: a record.
        pairs: of rows. All are one family in each task.
        margin: of a difference that does not matter, in the measure.
        at: a row at whose rate all are compared; None for each at its own.
    """
    found = []
    for task, runs in table.groupby("task", sort=False):
        measure = measure_of(task)
        values = by_seed(runs, f"report/{measure}", at)
        if values.empty:  # no row could be reported
            values = pd.DataFrame(index=range(2))
        found.append(compare(values, pairs, margin, less_is_better=measure == "loss").assign(task=task))
    return pd.concat(found, ignore_index=True)[["task", *found[0].columns.drop("task")]]


# ---------------------------------------------------------------------------------------------------------------------
# The statistics


def student(values: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """Low, mean and high of values `(n,)`; NaN if one of them is, or there are fewer than two."""
    from scipy import stats

    if len(values) < 2:
        return math.nan, math.nan, math.nan
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    reach = stats.t.ppf((1 + level) / 2, len(values) - 1) * error
    return float(mean - reach), float(mean), float(mean + reach)


def compare(
    values: pd.DataFrame, pairs: Sequence[tuple[str, str]], margin: float, less_is_better: bool = False, level: float = LEVEL
) -> pd.DataFrame:
    """The differences of pairs of rows, one family, with the verdicts that this file's docstring defines.

    Args:
        values: `(seeds, rows)`, two seeds or more. A row that is missing or has a NaN counts as stopped.
        pairs: (row, reference), the difference is the first − the second.
        margin: positive.
        less_is_better: whether a negative difference is "better".
        level: of the intervals; the tests are at 1 − level.

    Returns:
        row, reference, difference, low, high, low_all, high_all (simultaneous), p, p_holm, p_equivalent (by Holm), verdict.

    Raises:
        ValueError: if there is no pair, the margin is not positive, or there are fewer than two seeds.
    """
    if not pairs or not margin > 0 or len(values) < 2:
        raise ValueError(f"compare needs a pair, a positive margin and two seeds, not {list(pairs)}, {margin!r} and "
                         f"{len(values)}")
    n = len(values)
    all_rows = values.reindex(columns=list(dict.fromkeys(row for pair in pairs for row in pair)))
    d = np.stack([(all_rows[a] - all_rows[b]).to_numpy() for a, b in pairs], axis=1)  # (n, pairs)
    there = ~np.isnan(d).any(axis=0)  # (pairs,)
    error = d.std(axis=0, ddof=1) / math.sqrt(n)  # (pairs,)
    reach_all = np.full(len(pairs), max_t(d[:, there], level))
    return judge(pairs, d.mean(axis=0), error, np.full(len(pairs), n - 1), reach_all, margin, less_is_better, level)


def judge(
    pairs: Sequence[tuple[str, str]], mean: np.ndarray, error: np.ndarray, freedom: np.ndarray, reach_all: np.ndarray,
    margin: float, less_is_better: bool, level: float = LEVEL,
) -> pd.DataFrame:
    """`compare`, from the pairs' differences and what is known of their precision.

    Args:
        pairs: (row, reference), one family.
        mean, error: the difference and its standard error, NaN where a run was stopped. (pairs,)
        freedom: degrees of freedom of the error. (pairs,)
        reach_all: of the simultaneous intervals, in standard errors. (pairs,)
        margin, less_is_better, level: as in `compare`.
    """
    from scipy import stats

    there = ~np.isnan(mean)  # (pairs,)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, abs(mean) / error)  # no difference in any seed: t is 0
        inside = np.where(error == 0, np.sign(margin - abs(mean)) * math.inf, (margin - abs(mean)) / error)
    alone = np.where(there, 2 * stats.t.sf(t, freedom), np.nan)
    p, p_equivalent = holm(alone), holm(np.where(there, stats.t.sf(inside, freedom), np.nan))
    reach, reach_all = stats.t.ppf((1 + level) / 2, freedom) * error, reach_all * error
    better = mean < 0 if less_is_better else mean > 0
    verdict = np.select(
        [~there, p_equivalent <= 1 - level, ~(p <= 1 - level), better],
        ["stopped", "equivalent", "not separable", "better"], "worse")
    rows, references = zip(*pairs)
    return pd.DataFrame({
        "row": rows, "reference": references, "difference": mean, "low": mean - reach, "high": mean + reach,
        "low_all": mean - reach_all, "high_all": mean + reach_all, "p": alone, "p_holm": p, "p_equivalent": p_equivalent,
        "verdict": verdict})


def holm(p: np.ndarray) -> np.ndarray:
    """The p-values `(m,)` corrected by Holm: each is at most α just when the step-down test rejects at α. NaN stay."""
    corrected = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    scaled = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected


def max_t(d: np.ndarray, level: float = LEVEL, seed: int = 0) -> float:
    """The quantile of max |t| over the columns of d `(n, m)`, were their means zero. At least that of one t.

    Columns that do not vary say nothing and are left out.
    """
    from scipy import stats

    n = len(d)
    least = float(stats.t.ppf((1 + level) / 2, n - 1))
    around = d - d.mean(axis=0)  # (n, m)
    around = around[:, around.std(axis=0) > 0]
    if around.shape[1] < 2:
        return least
    around = around / around.std(axis=0)
    random, largest = np.random.default_rng(seed), []
    for _ in range(0, DRAWS, 1000):
        new = random.standard_normal((1000, n, n)) @ around / math.sqrt(n)  # (1000, n, m), of the d's covariance
        t = abs(new.mean(axis=1)) / (new.std(axis=1, ddof=1) / math.sqrt(n))  # (1000, m)
        largest.append(t.max(axis=1))
    return max(least, float(np.quantile(np.concatenate(largest), level)))
