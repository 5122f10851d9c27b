"""Do lengths and directions change together in full fine-tuning, LoRA and DoRA, other than by chance?

The analysis of Liu et al. 2024 (arXiv 2402.09353, section 3.2) on another model. By rows of a weight W and of W′ = W + ΔW,

    ΔM = mean | ‖W′‖ − ‖W‖ |        ΔD = mean (1 − cos(W′, W))        (its equations 3 and 4)

for the matrices of all layers at four checkpoints. The paper takes the query matrices of VL-BART (six layers, four image-text
tasks; all of it fine-tuned, or adapters on query and value) and finds correlations of −0.62 in full fine-tuning, +0.83 in
LoRA and −0.31 in DoRA, and slopes of these signs. Its analysis comes before it detaches the norm, so its DoRA is taken to be
the exact one; both are run.

MiniLM (22.6 M, six layers) classifies the sentences of CoLA and SST-2, cut at 32 tokens. Trained: ΔW itself ("full
fine-tuning": biases, normalizations and embeddings stay fixed), LoRA of rank 8 and DoRA around it, s = 1, on all 36 linear
layers or on query and value alone; the head in full, at the same rate. AdamW without weight decay, dropout or clipping; the
rate falls linearly to zero, and the checkpoints are at equal fractions of the run. Each method has its own rate, found with
the same budget (`deltaw.experiments.engine.tuning`) on a part of the training set: five rates half a decade apart (and on, where an
end is best), then three a quarter of a decade apart around the best. The analysis is of fresh seeds at that rate. One rate
for all would compare sizes.

Beside every trained matrix at every checkpoint stand random changes of its size ‖ΔW‖, drawn anew: of the same rank (in
DoRA's case, of the rank inside) and of full rank. They have learnt nothing: the null. "along" is the part of ‖ΔW‖² along
the rows of W times the number of inputs: 1 for a random change of any size and rank.

A run's correlation is Pearson's over its points (ΔD, ΔM) of one kind of matrix, the paper's being query, in three views:
"pooled" (layers × checkpoints, as in the paper), "within layer" and "within checkpoint" (each layer's or checkpoint's mean
taken away before). The slope is that of ΔM over ΔD by least squares. All are averaged over runs; intervals, of 95 %, are
Student's t times a standard error by bootstrap over runs. A difference is taken within each run, or between runs of a seed.

Fixed before the run (chapter 5's runs of 12 steps were known, no longer ones):

- *Primary endpoint.* Trained − random of the same rank in the pooled correlation of the query matrices, in the mean of the
  tasks, where it is as in the paper: full fine-tuning of all layers, LoRA on query and value. Hypothesis: "as chance" for
  both, the whole interval within ±`BOUND`. Against it: "other than chance", the whole interval outside.
- *Signs.* Full fine-tuning's pooled correlation is positive like LoRA's; −0.62 does not come. Against it: an interval
  below zero.
- *The null* is at 0.8 or more, pooled, at the sizes of all methods. Where it is not, +0.83 would say something.
- *DoRA* puts more than ten times what chance does along the rows, the others less than three times; it moves lengths further
  than a random change of its size. Its pooled correlation is below its null's. Its sign is not predicted.
- *Exact and detached* DoRA are within 0.1 of each other.
- *Within a checkpoint* sizes vary between layers only, so all correlations are smaller there. If the paper's signs are to be
  seen anywhere, it is there.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..adapters import DoRA, LoRA, Spec
from ..bank import Bank
from ..train import History
from .engine import verdicts
from .engine.decomposition import FULL_RANK, SAME_RANK, TRAINED, Watch
from .engine.ends import FullLinear
from .engine.subjects import hashes, subject
from .engine.trained import Size, parts, recipe, summary
from .engine.tuning import Budget, Row, Run, search

FULL = "full fine-tuning"
METHODS: dict[str, Callable[[int], Spec]] = {
    FULL: lambda rank: FullLinear(),
    "LoRA": LoRA,
    "DoRA": lambda rank: DoRA(LoRA(rank)),
    "DoRA, exact gradient": lambda rank: DoRA(LoRA(rank), detach_norm=False),
}
ALL, QV = "all-linear", "query, value"
VIEWS = {"pooled": [], "within layer": ["layer"], "within checkpoint": ["step"]}  # whose means are taken away
PAPER = {(FULL, ALL): -0.62, ("LoRA", QV): 0.83, ("DoRA, exact gradient", QV): -0.31}  # pooled, of query
BOUND = 0.15  # of the primary endpoint
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Settings(Budget):
    """What is run: `Budget`'s fields, and

    Attributes:
        tasks: names, as `deltaw.tasks.text` knows them.
        targets: "all-linear", or names with a comma between them.
        rank: of LoRA and DoRA.
        checkpoints: how many, at equal fractions of the run; the last is its end.
    """

    coarse: tuple[float, ...] = (1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2)
    fine: int = 3
    spacing: float = 1.778
    tune_seeds: tuple[int, ...] = (100, 101)
    report_seeds: tuple[int, ...] = tuple(range(8))
    tasks: tuple[str, ...] = ("cola", "sst2")
    targets: tuple[str, ...] = (ALL, QV)
    rank: int = 8
    checkpoints: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoints < 2 or self.steps % self.checkpoints:
            raise ValueError(f"checkpoints must be two or more and divide steps={self.steps}, not {self.checkpoints!r}")

    @property
    def at(self) -> list[int]:
        """After how many updates the checkpoints are."""
        return [self.steps * i // self.checkpoints for i in range(1, self.checkpoints + 1)]


QUICK = Settings(coarse=(1e-4, 1e-3), fine=1, further=0, tune_seeds=(100,), report_seeds=(0, 1), steps=2, warmup_steps=1,
                 batch_size=2, length=8, limit=12, tasks=("docstrings",), targets=(QV,), rank=2, checkpoints=2)


def cells(settings: Settings) -> list[dict]:
    return [{"task": task, "targets": targets} for task, targets in itertools.product(settings.tasks, settings.targets)]


def data(settings: Settings) -> dict[str, str]:
    return hashes(settings.tasks, settings)


def rows(settings: Settings) -> list[Row]:
    """The methods, as what is tuned. The start is drawn from the seed by `attach`."""
    return [Row(name, lambda seed, make=make: make(settings.rank)) for name, make in METHODS.items()]


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """Rows of two forms, told apart by "what".

    - "run", one a run: method, phase, rate, seed, stopped, and what it measures on "tune" and "report".
    - "matrix", one a reporting run, step, layer, kind and change (trained, or random as `SAME_RANK` and `FULL_RANK` say):
      ΔM and ΔD. Of the trained ones ΔM/m (each row's in units of its length), size ‖ΔW‖/‖W‖, along, and loss, the mean
      training loss of the run's last tenth before the checkpoint, too.
    """
    what = subject(cell["task"], settings, device)
    model = what.task.model()
    targets = ALL if cell["targets"] == ALL else cell["targets"].split(", ")
    sizes = {row.name: Size.of(model, row.spec(0), what.head) for row in rows(settings)}
    matrices: list[dict] = []

    def train(runs: list[Run]) -> list[dict]:
        results: dict[int, dict] = {}
        reporting = runs[0][2] in settings.report_seeds  # `search` asks for the runs of one phase at a time
        for part in parts([(sizes[row.name], rate, seed) for row, rate, seed in runs], what, device):
            own = [runs[i] for i in part]
            slots = [(row.spec(seed), recipe(what.budget, row, rate, seed)) for row, rate, seed in own]
            bank = Bank(model, slots, targets=targets, train_also=what.head, reset_also=True)
            watch = Watch(settings.at if reporting else (), [seed for *_, seed in own],
                          [None if row.name == FULL else settings.rank for row, *_ in own])
            on = {"device": "cpu"} if device == "cpu" else {"cuda_graph": True}
            histories = bank.fit(what.task, watch=watch, progress=False, **on)
            results |= {i: {"scale": runs[i][0].scale, **summary(history)} for i, history in zip(part, histories)}
            for (row, _, seed), history, seen in zip(own, histories, watch.seen.values(), strict=True):
                if not history.stopped:
                    matrices.extend({"method": row.name, "seed": seed, **each, **_loss(history, each)} for each in seen)
        return [results[i] for i in range(len(runs))]

    found = search(rows(settings), train, settings, what.measure)
    return [{"what": "run", "method": run.pop("row"), **run} for run in found] + [{"what": "matrix"} | row for row in matrices]


def _loss(history: History, row: dict) -> dict[str, float]:
    tenth = max(1, history.recipe.steps // 10)
    last = history.loss[max(0, row["step"] - tenth):row["step"]]
    return {"loss": float(np.mean(last))} if row["change"] == TRAINED else {}


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from the record, DataFrame in, DataFrame out


def reported(table: pd.DataFrame) -> pd.DataFrame:
    """Of each task, targets and method: the rate, whether it is at an edge, the measure on "report" with its interval.

    As `verdicts.reported`, with targets and method for row.
    """
    runs = table[table["what"] == "run"].rename(columns={"method": "row"})
    found = [verdicts.reported(some).assign(targets=targets) for targets, some in runs.groupby("targets", sort=False)]
    found = pd.concat(found, ignore_index=True).rename(columns={"row": "method"})
    return found[["task", "targets", *found.columns.drop(["task", "targets", "scale"])]]


def points(table: pd.DataFrame, kind: str | None = "query") -> pd.DataFrame:
    """The record's matrices of one kind, or of all (None).

    Raises:
        ValueError: if there is no such kind.
    """
    found = table[table["what"] == "matrix"].dropna(axis=1, how="all")
    kinds = list(found["kind"].unique())
    if kind is not None and kind not in kinds:
        raise ValueError(f"kind must be one of {kinds} or None, not {kind!r}")
    return found if kind is None else found[found["kind"] == kind]


def by_run(table: pd.DataFrame, kind: str = "query") -> pd.DataFrame:
    """Correlation and slope of ΔM over ΔD in each run: a row a task, targets, method, change, seed and view.

    Task "mean" is the mean of the tasks, where there are several.
    """
    found = []
    keys = ["task", "targets", "method", "change", "seed"]
    for key, run in points(table, kind).groupby(keys, sort=False):
        for view, means in VIEWS.items():
            x, y = (run[column] - (run.groupby(means)[column].transform("mean") if means else run[column].mean())
                    for column in ("ΔD", "ΔM"))
            found.append(dict(zip(keys, key)) | {"view": view, "correlation": (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()),
                                                 "slope": (x * y).sum() / (x**2).sum()})
    return _with_mean(pd.DataFrame(found), [*keys[1:], "view"])


def correlations(table: pd.DataFrame, kind: str = "query") -> pd.DataFrame:
    """Of each task, targets, method and view: the correlation of ΔM with ΔD, the null's, and the paper's.

    Columns: correlation, low, high, least and largest (of single runs); null (random, of the same rank), null_low,
    null_high; null_full_rank; difference (trained − null), difference_low, difference_high; slope, slope_low, slope_high;
    null_slope; runs; paper (NaN where the paper has none: it is of query matrices, pooled).
    """
    found = []
    runs = by_run(table, kind)
    for key, some in runs.groupby(["task", "targets", "method", "view"], sort=False):
        wide = some.pivot(index="seed", columns="change", values=["correlation", "slope"])
        r, slope = wide["correlation"], wide["slope"]  # (runs, changes) each
        same = SAME_RANK if SAME_RANK in r else FULL_RANK
        row = dict(zip(["task", "targets", "method", "view"], key))
        row |= _estimate("correlation", r[TRAINED]) | {"least": r[TRAINED].min(), "largest": r[TRAINED].max()}
        row |= _estimate("null", r[same], "null_") | {"null_full_rank": r[FULL_RANK].mean()}
        row |= _estimate("difference", r[TRAINED] - r[same], "difference_") | _estimate("slope", slope[TRAINED], "slope_")
        paper = PAPER.get((row["method"], row["targets"]), np.nan) if (kind, row["view"]) == ("query", "pooled") else np.nan
        found.append(row | {"null_slope": slope[same].mean(), "runs": len(r), "paper": paper})
    return pd.DataFrame(found)


def primary(table: pd.DataFrame) -> pd.DataFrame:
    """The primary endpoint: full fine-tuning's and LoRA's rows of `correlations` that stand beside the paper's, with verdict."""
    found = correlations(table)
    found = found[found["paper"].notna() & found["method"].isin([FULL, "LoRA"]) & (found["task"] == found["task"].iloc[-1])]
    inside = (found["difference_low"] > -BOUND) & (found["difference_high"] < BOUND)
    outside = (found["difference_low"] > BOUND) | (found["difference_high"] < -BOUND)
    columns = ["task", "targets", "method", "correlation", "null", "difference", "difference_low", "difference_high", "paper"]
    return found[columns].assign(verdict=np.select([inside, outside], ["as chance", "other than chance"], "not resolved"))


def contrasts(table: pd.DataFrame, kind: str = "query", pairs: Sequence[tuple[str, str]] = (
        ("LoRA", FULL), ("DoRA, exact gradient", FULL), ("DoRA, exact gradient", "LoRA"),
        ("DoRA", "DoRA, exact gradient"))) -> pd.DataFrame:
    """Between two methods on the same targets, paired by seeds: the difference of their correlations, with its interval,
    and of what their correlations have beyond their nulls, with its own (beyond, beyond_low, beyond_high)."""
    found = []
    for (task, targets, view), some in by_run(table, kind).groupby(["task", "targets", "view"], sort=False):
        r = some.pivot(index="seed", columns=["method", "change"], values="correlation")
        beyond = {method: r[method, TRAINED] - r[method].get(SAME_RANK, r[method, FULL_RANK]) for method in r.columns.levels[0]}
        for a, b in pairs:
            if a in beyond and b in beyond:
                found.append({"task": task, "targets": targets, "view": view, "method": a, "reference": b}
                             | _estimate("difference", (r[a, TRAINED] - r[b, TRAINED]).dropna())
                             | _estimate("beyond", (beyond[a] - beyond[b]).dropna(), "beyond_"))
    return pd.DataFrame(found)


def beyond_chance(table: pd.DataFrame, kind: str | None = "query") -> pd.DataFrame:
    """How lengths and directions move beside random changes of the same size and rank, whatever that size is.

    Of each task, targets and method, averaged over matrices and checkpoints of a run (the ratios in the logs), then over
    runs: along (chance: 1), low, high; longer, ΔM over the random one's, longer_low, longer_high; turned, ΔD over the random
    one's, turned_low, turned_high.
    """
    keys = ["task", "targets", "method", "seed"]
    some = points(table, kind)
    same = np.where(some["method"] == FULL, FULL_RANK, SAME_RANK)
    matrix = [*keys, "step", "layer", "kind"]
    trained = some[some["change"] == TRAINED].set_index(matrix)
    random = some[some["change"] == same].set_index(matrix)
    each = pd.DataFrame({"along": trained["along"], "longer": np.log(trained["ΔM"] / random["ΔM"]),
                         "turned": np.log(trained["ΔD"] / random["ΔD"])})
    runs = _with_mean(each.groupby(keys, sort=False).mean().reset_index(), keys[1:])
    found = []
    for key, run in runs.groupby(keys[:-1], sort=False):
        logs = {name: {part: np.exp(value) for part, value in _estimate(name, run[name], f"{name}_").items()}
                for name in ("longer", "turned")}
        found.append(dict(zip(keys, key)) | _estimate("along", run["along"]) | logs["longer"] | logs["turned"])
    return pd.DataFrame(found)


def _with_mean(runs: pd.DataFrame, keys: Collection[str]) -> pd.DataFrame:
    """With the mean of the tasks as one more task, of runs that all of them have."""
    tasks = runs["task"].nunique()
    if tasks < 2:
        return runs
    groups = runs.drop(columns="task").groupby(list(keys), sort=False)
    mean = groups.mean()[groups.size() == tasks].reset_index()
    return pd.concat([runs, mean.assign(task="mean")], ignore_index=True)


def _estimate(name: str, values: pd.Series, prefix: str = "") -> dict[str, float]:
    """The mean over runs `(n,)`, as `name`, and the ends of its interval; NaN for fewer than two runs."""
    from scipy import stats

    values, n = values.to_numpy(float), len(values)
    found = {name: values.mean(), f"{prefix}low": np.nan, f"{prefix}high": np.nan}
    if n > 1:
        drawn = values[np.random.default_rng(0).integers(n, size=(DRAWS, n))].mean(axis=1)  # (DRAWS,)
        error = drawn.std() * np.sqrt(n / (n - 1))  # resamples of n vary too little, by this factor
        reach = stats.t.ppf(0.975, n - 1) * error
        found |= {f"{prefix}low": found[name] - reach, f"{prefix}high": found[name] + reach}
    return found
