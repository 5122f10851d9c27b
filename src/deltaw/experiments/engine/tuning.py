"""Competitors tuned alike: the same budget of runs for every row, fixed before. An engine; the experiments call it.

A *row* is a competitor: a name, what to build, and what of the recipe it changes. All rows of a cell go through `search`:

1. *Coarse.* The rates of one grid, the same for all rows, with the tuning seeds. While a row's best rate is at an end of
   its grid, the grid goes on there by one more rate, at most `further` times.
2. *Fine.* `fine` rates a factor `spacing` apart around the row's best, which is one of them; extended likewise.
3. *Choice.* The rate of the best mean over seeds of the measure on "tune"; of equals, that of the lower loss. A rate at
   which a run was stopped is not chosen. A choice that is still the lowest or highest rate tried is at the *edge*.
4. *Report.* Fresh seeds at the chosen rate, measured on "report". With a `reference` row, phase "shared", every row at
   the reference's rate too, with the same seeds; a run that is there already is not made again.

A seed is one draw of the start (of whatever a row draws), of the head and of the order of the examples; the last two are
the same for all rows. The runs are made in `trained.py`; what follows from them is in `verdicts.py`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pandas as pd

from ...adapters import Spec
from ...tasks.text import MEASURES

TUNING = ("coarse", "fine")  # phases from which the rate is chosen


@dataclass(frozen=True)
class Row:
    """A competitor.

    Attributes:
        name: it is called so in the record.
        spec: what to build for a seed. Most do not look at it: `attach` draws the start from the seed.
        scale: α or the scale, stated in words.
        recipe: what of the common recipe the row changes.
    """

    name: str
    spec: Callable[[int], Spec]
    scale: str = "s = 1"
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """What every row gets: an experiment's `Settings` adds its own fields.

    Attributes:
        coarse: rates, rising, of factors and head alike.
        fine: how many rates around the best, odd; 1 for no fine pass.
        spacing: the factor between them.
        further: rates beyond an end of a grid, at most, in each pass.
        tune_seeds, report_seeds: no seed is in both; of the latter at least two.
        steps, warmup_steps, batch_size: of each run. The rate rises, then falls linearly to zero.
        length: tokens a sentence, cut or padded.
        share: of the training set's whole sentences, for "tune".
        limit: at most so many training and so many validation sentences are read.

    Raises:
        ValueError: if the grids or the seeds are not such.
    """

    coarse: tuple[float, ...] = (1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1)
    fine: int = 5
    spacing: float = math.sqrt(2)
    further: int = 3
    tune_seeds: tuple[int, ...] = (100, 101, 102)
    report_seeds: tuple[int, ...] = tuple(range(10))
    steps: int = 500
    warmup_steps: int = 25
    batch_size: int = 32
    length: int = 32
    share: float = 0.2
    limit: int = 1_000_000

    def __post_init__(self) -> None:
        if len(self.coarse) < 2 or list(self.coarse) != sorted({rounded(rate) for rate in self.coarse}):
            raise ValueError(f"coarse must be two or more rising rates of three digits, not {self.coarse!r}")
        if self.fine % 2 != 1 or self.spacing <= 1 or self.further < 0:
            raise ValueError(f"fine must be odd, spacing above 1 and further not negative, not {self.fine!r}, "
                             f"{self.spacing!r}, {self.further!r}")
        seeds = [*self.tune_seeds, *self.report_seeds]
        if len(set(seeds)) < len(seeds) or not self.tune_seeds or len(self.report_seeds) < 2:
            raise ValueError(f"no seed may be there twice, and two must report: {self.tune_seeds!r}, {self.report_seeds!r}")


def rounded(rate: float) -> float:
    """To three digits: what is asked for again is the same number."""
    return float(f"{rate:.3g}")


@dataclass(frozen=True)
class Budgets(Budget):
    """Of several kinds of tasks: `Budget`'s fields are for text; `digits_…` and `code_…` take their place, see `of`.

    Attributes:
        digits_steps, …: for "digits", whose image is one token.
        code_coarse, …: for "code_lm", whose example is `code_length` tokens.
        code_size: of the base, as in `deltaw.tasks.code_base.Base`, and base_steps, base_batch, deterministic.
        code_windows, code_blocks: of each set that is measured, and in how many parts of them losses are kept.
        packages, headers, vocabulary, code_share: the corpus, as in `deltaw.tasks.code_tokens.Options`.
    """

    digits_steps: int = 300
    digits_warmup_steps: int = 15
    digits_length: int = 1
    code_coarse: tuple[float, ...] = Budget.coarse
    code_steps: int = 200
    code_warmup_steps: int = 10
    code_batch_size: int = 16
    code_length: int = 256
    code_size: str = "45m"
    base_steps: int = 3000
    base_batch: int = 256
    deterministic: bool = True
    code_windows: int = 512
    code_blocks: int = 32
    packages: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    vocabulary: int = 8192
    code_share: float = 0.06

    def of(self, task: str) -> "Budgets":
        """The budget of a task: `code_steps` of "code_lm" is called `steps`, and so on."""
        prefix = {"digits": "digits_", "code_lm": "code_"}.get(task)
        names = [each.name for each in fields(Budget) if hasattr(self, f"{prefix}{each.name}")]
        return replace(self, **{name: getattr(self, f"{prefix}{name}") for name in names})


# `Budgets`' fields for a `QUICK`: packages that deltaw's own dependencies bring to every machine, the same as of the
# experiment `code_lm`, so that a process reads them once.
SMALL_CODE = {
    "code_length": 32, "code_size": "tiny", "base_steps": 30, "base_batch": 16, "code_windows": 48, "code_blocks": 4,
    "packages": ("filelock", "fsspec", "jinja2", "packaging", "tqdm"), "headers": ("numpy", "pyarrow"), "vocabulary": 512,
    "code_share": 0.15}


def measure_of(task: str) -> str:
    """What a task is judged by: a language model by its loss, of which less is better; else `MEASURES`, or accuracy."""
    return "loss" if task == "code_lm" else MEASURES.get(task, "accuracy")


# ---------------------------------------------------------------------------------------------------------------------
# The search


Run = tuple[Row, float, int]  # row, rate, seed


def search(
    rows: Sequence[Row], train: Callable[[list[Run]], list[dict]], budget: Budget, measure: str, reference: str | None = None
) -> list[dict]:
    """Tune and report the rows.

    Args:
        rows: names differ.
        train: gives for each run "stopped", and unless it was, "tune/…" and "report/…" of "loss" and `measure`.
        budget: the same for all rows.
        measure: as of `measure_of`.
        reference: a row at whose rate all are reported too.

    Returns:
        For each run row, phase, rate, seed and what `train` gave. A row none of whose rates can be chosen has no report.

    Raises:
        ValueError: if two rows have one name, or none is called `reference`.
    """
    names = [row.name for row in rows]
    if len(set(names)) < len(names) or reference not in (None, *names):
        raise ValueError(f"rows must have names that differ, and reference be one of them: {names}, {reference!r}")
    found: dict[tuple[str, float, int], dict] = {}

    def run(phase: str, wanted: Iterable[tuple[Row, float]], seeds: Sequence[int]) -> None:
        runs = [(row, rate, seed) for row, rate in wanted for seed in seeds if (row.name, rate, seed) not in found]
        for (row, rate, seed), result in zip(runs, train(runs) if runs else (), strict=True):
            found[row.name, rate, seed] = {"row": row.name, "phase": phase, "rate": rate, "seed": seed, **result}

    def chosen() -> dict[str, float]:
        rates = choices(pd.DataFrame(list(found.values())), measure)
        return {name: rate for name, rate in rates.items() if rate is not None}

    def sweep(phase: str, grids: dict[str, list[float]], step: float) -> None:
        """The rates of the grids, and beyond an end that is best. Where all runs were stopped, a rate was too large."""
        new = grids
        for _ in range(1 + budget.further):
            run(phase, [(row, rate) for row in rows for rate in new.get(row.name, ())], budget.tune_seeds)
            new, best = {}, chosen()
            for name, grid in grids.items():
                at = best.get(name, min(grid))
                if at in (min(grid), max(grid)):
                    new[name] = [rounded(at * step if at == max(grid) else at / step)]
            grids = {name: grid + new.get(name, []) for name, grid in grids.items()}

    sweep("coarse", {name: list(budget.coarse) for name in names}, budget.coarse[-1] / budget.coarse[-2])
    if budget.fine > 1:
        around = [budget.spacing**k for k in range(-(budget.fine // 2), budget.fine // 2 + 1)]
        grids = {name: [rounded(rate * factor) for factor in around] for name, rate in chosen().items()}
        sweep("fine", grids, budget.spacing)
    rates = chosen()
    run("report", [(row, rates[row.name]) for row in rows if row.name in rates], budget.report_seeds)
    if reference in rates:
        run("shared", [(row, rates[reference]) for row in rows], budget.report_seeds)
    return list(found.values())


def choices(table: pd.DataFrame, measure: str) -> dict[str, float | None]:
    """By row, the rate chosen from the tuning phases' runs; None if at every rate a run was stopped."""
    runs = table[table["phase"].isin(TUNING)]
    values = runs.reindex(columns=list(dict.fromkeys([f"tune/{measure}", "tune/loss"]))).astype(float)
    groups = [runs["row"], runs["rate"]]
    means = values.groupby(groups).mean()[~values.isna().any(axis=1).groupby(groups).any()]  # by row and rate
    score = -means["tune/loss"] if measure == "loss" else means[f"tune/{measure}"]
    best = score >= score.groupby(level="row").transform("max") - 1e-12  # of equal scores the lowest loss
    chosen = means.loc[best, "tune/loss"].groupby(level="row").idxmin()
    return dict.fromkeys(runs["row"].unique()) | {row: float(rate) for row, rate in chosen}
