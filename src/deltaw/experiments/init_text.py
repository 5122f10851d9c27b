"""Does Init[A] beat Init[B] on a real model, once each has its own tuned learning rate?

MiniLM (22.6 M) classifies the sentences of CoLA, SST-2, TREC and SUBJ. LoRA of rank 8, s = 1, on all 36 linear layers
of the encoder; the head is trained in full. One learning rate for factors and head alike: it rises for `warmup_steps`
and falls linearly to zero. AdamW without weight decay, dropout or clipping. A seed is one draw of the factor that is not
zero, of the head, and of the order of the examples; Init[A] and Init[B] share the last two.

Fixed before the run:

- *Data.* A run trains on a part of the training set and is measured on another part, "tune", so that no sentence of the
  one is contained in a sentence of the other (`deltaw.tasks.text.split`); and on the validation set, "report", without
  the sentences that the training set has too.
- *Measure.* Matthews' correlation for CoLA, accuracy for the others.
- *Rates.* A factor of 2 apart. A pilot on TREC and SST-2 (one other seed, 150 and 120 steps of 16 examples, seven rates
  half a decade apart) was best on "tune" at 1e-3 or 3e-3 for both starts; 1e-4 was too small, 1e-2 too large.
- *Choice.* Of each task and start, the rate of the best mean over seeds on "tune"; of equals, that of the lower loss. A
  rate at which a run was stopped is not chosen. A choice at the grid's edge is flagged, and counts as not tuned.
- *Hypotheses*, those of arXiv 2406.08447: Init[A] ends up better than Init[B], and at a larger rate.
- *Primary endpoint.* A − B of the measure on "report", each start at its chosen rate, in the mean of the tasks.
  Secondary: the same for each task, and the decades from B's chosen rate to A's. The verdict is a start's name if the
  95 % interval of the difference lies on its side of zero, else "not separated"; those of single tasks are not
  corrected for their number.
- *Intervals*, of 95 %: Student's t times a standard error by bootstrap over seeds, the same seeds for every task and
  start, the choice of the rate made again in every resample. Where the choice never changes, that is the usual interval
  of a mean of paired differences. They hold for these validation sentences; others may differ by more.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from ..adapters import LoRA
from ..bank import Bank
from ..tasks.text import MEASURES, fingerprint, text
from ..train import History, Recipe

DRAWS = 10_000  # resamples of a bootstrap
BYTES_A_TOKEN = 300_000  # that a slot takes of a GPU's memory, at most
WINDOWS = 10  # equal stretches of a run, whose mean training losses are kept


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        tasks: names, as `deltaw.tasks.text` knows them.
        starts: LoRA's `init`.
        rates: the grid, of factors and head alike.
        seeds: at least two.
        rank, steps, warmup_steps, batch_size: of each run.
        length: tokens a sentence, cut or padded.
        share: of the training set's whole sentences, for "tune".
        limit: at most so many training and so many validation sentences are read.
    """

    tasks: tuple[str, ...] = ("cola", "sst2", "trec", "subj")
    starts: tuple[str, ...] = ("A", "B")
    rates: tuple[float, ...] = tuple(1e-3 * 2.0**k for k in range(-4, 5))
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rank: int = 8
    steps: int = 500
    warmup_steps: int = 25
    batch_size: int = 32
    length: int = 64
    share: float = 0.2
    limit: int = 1_000_000


QUICK = Settings(("docstrings",), rates=(1e-3, 3e-3, 1e-2), seeds=(0, 1), steps=10, warmup_steps=2, batch_size=4,
                 length=16, limit=60)


def cells(settings: Settings) -> list[dict]:
    """A cell is a task: all its runs are one bank."""
    return [{"task": task} for task in settings.tasks]


def data(settings: Settings) -> dict[str, str]:
    return {task: fingerprint(task) for task in settings.tasks}


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """A row for each start, rate and seed: what it measures on both sets, and its training loss in tenths of the run."""
    task = text(cell["task"], length=settings.length, limit=settings.limit).for_tuning(settings.share, report=True)
    runs = [(start, rate, seed) for start in settings.starts for rate in settings.rates for seed in settings.seeds]
    bank = Bank(task.model(), [_slot(settings, *run) for run in runs], train_also=["classifier"], reset_also=True)
    if device == "cpu":
        histories = bank.fit(task, device="cpu")
    else:
        slot = settings.batch_size * settings.length * BYTES_A_TOKEN
        fit = torch.cuda.get_device_properties(device).total_memory // slot
        histories = bank.fit(task, slots_at_once=max(1, fit), cuda_graph=fit >= len(runs))
    return [{"start": start, "rate": rate, "seed": seed, "stopped": history.stopped, **history.metrics, **_tenths(history)}
            for (start, rate, seed), history in zip(runs, histories, strict=True)]


def _slot(settings: Settings, start: str, rate: float, seed: int) -> tuple[LoRA, Recipe]:
    return LoRA(settings.rank, init=start), Recipe(
        steps=settings.steps, learning_rate=rate, schedule="linear", warmup_steps=settings.warmup_steps,
        batch_size=settings.batch_size, seed=seed)


def _tenths(history: History) -> dict[str, float]:
    loss = np.full(history.recipe.steps, np.nan)  # (steps,)
    loss[:len(history.loss)] = history.loss
    return {f"train_loss_{i}": float(part.mean()) for i, part in enumerate(np.array_split(loss, WINDOWS), 1)}


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from the record, DataFrame in, DataFrame out


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """The measure against the rate: mean, least and largest over the seeds whose runs were not stopped."""
    rows = []
    for task in table["task"].unique():
        for part in ("tune", "report"):
            column = f"{part}/{MEASURES.get(task, 'accuracy')}"
            found = table[table["task"] == task].groupby(["start", "rate"])[column].agg(["mean", "min", "max"]).reset_index()
            rows.append(found.assign(task=task, set=part))
    return pd.concat(rows)[["task", "set", "start", "rate", "mean", "min", "max"]].reset_index(drop=True)


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Of each task and start: the rate chosen on "tune", whether it is at the grid's edge, and the measure on "report".

    `low` and `high` are the interval's ends of `report`, `rate_low` and `rate_high` those of the rate.
    """
    rows = []
    for task in table["task"].unique():
        tuned = _tuned(table, task)
        for start, rates, report in zip(tuned.starts, tuned.rate, tuned.report):
            low, high = _interval(report, tuned.seeds)
            rate_low, rate_high = (10**end for end in _interval(np.log10(rates), tuned.seeds))
            rows.append({"task": task, "start": start, "rate": rates[0], "rate_low": rate_low, "rate_high": rate_high,
                         "at_edge": rates[0] in tuned.edges, "report": report[0], "low": low, "high": high})
    return pd.DataFrame(rows)


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """A − B of the measure on "report" at the chosen rates, for each task and in their mean, with interval and verdict.

    `decades` is log10 of A's chosen rate over B's, with its own interval.
    """
    tasks, found = list(table["task"].unique()), []
    for task in tasks:
        tuned = _tuned(table, task)
        a, b = tuned.starts.index("A"), tuned.starts.index("B")
        found.append((tuned.report[a] - tuned.report[b], np.log10(tuned.rate[a] / tuned.rate[b])))  # (1 + DRAWS,) each
    rows = []
    for task, values in zip([*tasks, "mean"], [*found, np.mean(found, axis=0)]):
        (low, high), (decades_low, decades_high) = (_interval(value, tuned.seeds) for value in values)
        rows.append({"task": task, "difference": values[0][0], "low": low, "high": high,
                     "verdict": "A" if low > 0 else "B" if high < 0 else "not separated",
                     "decades": values[1][0], "decades_low": decades_low, "decades_high": decades_high})
    return pd.DataFrame(rows)


class _Tuned(NamedTuple):
    """What is chosen and reported; `rate` and `report` are (starts, 1 + DRAWS): of all seeds, then of resamples."""

    starts: list[str]
    edges: tuple[float, float]  # of the grid
    seeds: int
    rate: np.ndarray
    report: np.ndarray


def _tuned(table: pd.DataFrame, task: str) -> _Tuned:
    rows = table[table["task"] == task].set_index(["start", "rate", "seed"]).sort_index()
    starts, grid, seeds = (list(level) for level in rows.index.remove_unused_levels().levels)
    n = len(seeds)
    resamples = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS)  # (DRAWS, n), how often each seed
    weights = np.concatenate([np.ones((1, n)), resamples]) / n  # (1 + DRAWS, n)

    def means(column: str) -> np.ndarray:
        values = rows[column].to_numpy(float).reshape(len(starts), len(grid), n)
        return values @ weights.T  # (starts, rates, 1 + DRAWS)

    name = MEASURES.get(task, "accuracy")
    score, loss = means(f"tune/{name}"), means("tune/loss")
    score = np.where(np.isnan(score), -math.inf, score)  # a run was stopped
    equals = score >= score.max(axis=1, keepdims=True) - 1e-12
    best = np.where(equals, loss, math.inf).argmin(axis=1)  # (starts, 1 + DRAWS)
    report = np.take_along_axis(means(f"report/{name}"), best[:, None], axis=1)[:, 0]  # (starts, 1 + DRAWS)
    return _Tuned(starts, (grid[0], grid[-1]), n, np.array(grid)[best], report)


def _interval(values: np.ndarray, n: int) -> tuple[float, float]:
    """The 95 % interval of `values[0]`, of n independent units; `values[1:]` are those of its resamples."""
    from scipy import stats

    error = values[1:].std() * math.sqrt(n / (n - 1))  # resamples of n units vary too little, by this factor
    reach = stats.t.ppf(0.975, n - 1) * error
    return float(values[0] - reach), float(values[0] + reach)
